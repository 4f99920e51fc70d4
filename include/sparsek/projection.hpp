// The SPARSEK operator: the Euclidean projection of scores onto {p : 0 <= p <= 1, sum p = k}.
#pragma once
#include <cstdint>

#include "sparsek/context.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

// p_j = clip(z_j - tau, 0, 1) with tau such that sum_j p_j = k (arXiv 2406.16747, section 3.2). All
// zeros for k = 0, all ones for k >= n.
//
// z  [R, n] float32 or float64, any strides, finite
// p  [R, n] out, same dtype, contiguous
//
// Throws InvalidArgument on a wrong shape or dtype or a negative k. Host memory only.
void sparsek_projection(Context const& context, ConstTensorView<2> const& z, std::int64_t k,
                        TensorView<2> const& p);

// The vector-Jacobian product of sparsek_projection: with I = {j : 0 < p_j < 1},
// dz_j = dp_j - mean_{l in I} dp_l for j in I, else 0.
//
// p, dp  [R, n] float32 or float64; p as sparsek_projection wrote it
// dz     [R, n] out, same dtype, contiguous
void sparsek_projection_backward(Context const& context, ConstTensorView<2> const& p,
                                 ConstTensorView<2> const& dp, TensorView<2> const& dz);

}  // namespace sparsek
