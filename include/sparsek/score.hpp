// Stage 1, score: one importance per token and KV head.
//
// Learned scores come from the model. Without any, the key norm serves: tokens with a small key
// norm tend to be the ones that later queries attend to.
#pragma once
#include <optional>

#include "sparsek/context.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

// u_j = -||k_j||_2, accumulated in float32.
//
// k        [B, Hkv, Sk, D] float16, bfloat16 or float32, last dimension contiguous
// lengths  int32 [B] or none: scores at positions >= lengths[b] are 0 and their keys are not read
// scores   float32 [B, Hkv, Sk] out, contiguous (float64 on the reference backend where k is
// float64)
//
// Throws InvalidArgument on a wrong shape or dtype.
void key_norm_scores(Context const& context, ConstTensorView<4> const& k,
                     std::optional<ConstTensorView<1>> const& lengths, TensorView<3> const& scores);

// Packed sequences: k [total_k, Hkv, D], scores [total_k, Hkv] out, any strides.
void key_norm_scores_varlen(Context const& context, ConstTensorView<3> const& k,
                            TensorView<2> const& scores);

}  // namespace sparsek
