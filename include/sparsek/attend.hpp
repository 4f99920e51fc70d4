// Stage 3, attend: softmax attention of each query over the keys that it sees.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "sparsek/context.hpp"
#include "sparsek/select.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

// How a selected key's gate m_ij = clip(u_j - tau_c, 0, 1) enters (window keys: m = 1). With s_ij =
// sm_scale * q_i . k_j:
//   kSoftmax  p_ij ~ m_ij exp(s_ij),  o_i = sum_j p_ij v_j
//   kValue    p_ij ~ exp(s_ij),       o_i = sum_j p_ij m_ij v_j   (the paper's form)
//   kNone     m = 1
enum class Gate : std::uint8_t { kNone, kValue, kSoftmax };

// Where a selection comes from: from select, or from anything else that evicts irrevocably (then
// only expiry counts).
enum class SelectionOrigin : std::uint8_t { kSelect, kForeign };

struct AttendOptions {
  Gate gate = Gate::kSoftmax;
  std::optional<double> sm_scale{};  // unset: head_dim^-0.5
  // The configuration that the selection was made with; not read for a foreign one.
  SelectOptions selection{};
  SelectionOrigin origin = SelectionOrigin::kSelect;
  // Foreign selections only: an upper bound on the keys that any 128 consecutive queries see
  // besides the last 128 before them and themselves. Unset: unknown.
  std::optional<std::int64_t> max_keys_per_tile{};
};

// q          [B, Hq, Sq, D]; k, v [B, Hkv, Sk, D]: one dtype, any strides with a contiguous last
//            dimension, Hq % Hkv == 0. Queries are the last Sq positions: row r has position
//            Sk - Sq + r. Query head h reads KV head h / (Hq / Hkv).
// scores     float32 [B, Hkv, Sk], the scores that the selection was made from; may be none with
//            Gate::kNone
// selection  as select wrote it, or any expiry (with Gate::kNone)
// lengths    int32 [B] or none: keys and queries at positions >= lengths[b] do not exist (their
//            memory is not read)
// out        like q, out. A row that sees no key is 0.
// lse        float32 [B, Hq, Sq] out or none, contiguous: natural log of the sum of the weights
//            that p normalises; -inf where a row sees no key (float64 on the reference backend where
//            q is float64)
//
// Throws InvalidArgument on a wrong shape, dtype or value, Unsupported where no kernel serves the
// request. Deterministic: two calls give the same bits.
void attend(Context const& context, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
            ConstTensorView<4> const& v, std::optional<ConstTensorView<3>> const& scores,
            ConstSelectionView const& selection, std::optional<ConstTensorView<1>> const& lengths,
            AttendOptions const& options, TensorView<4> const& out,
            std::optional<TensorView<3>> const& lse);

// Bytes that attend takes from the context's allocator for this problem.
std::size_t attend_workspace_bytes(Context const& context, DataType dtype,
                                   std::array<std::int64_t, 4> const& q_shape,
                                   std::array<std::int64_t, 4> const& k_shape,
                                   AttendOptions const& options);

// Packed sequences of different lengths, FlashAttention's varlen convention: sequence b has the
// queries cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1, which are the last of the keys
// cu_seqlens_k[b] ... cu_seqlens_k[b + 1] - 1. Equals one attend per sequence.
//
// q, out        [total_q, Hq, D]; k, v [total_k, Hkv, D], any strides with a contiguous last
//               dimension
// scores        float32 [total_k, Hkv]; may be none with Gate::kNone
// selection     as select_varlen wrote it
// cu_seqlens_*  int32 [N + 1], on q's device: first 0, never falling, last total_*; no more queries
//               than keys
// lse           float32 [total_q, Hq] out or none, contiguous
void attend_varlen(Context const& context, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
                   ConstTensorView<3> const& v, std::optional<ConstTensorView<2>> const& scores,
                   ConstPackedSelectionView const& selection,
                   ConstTensorView<1> const& cu_seqlens_q, ConstTensorView<1> const& cu_seqlens_k,
                   AttendOptions const& options, TensorView<3> const& out,
                   std::optional<TensorView<2>> const& lse);

// q_shape [total_q, Hq, D], k_shape [total_k, Hkv, D].
std::size_t attend_varlen_workspace_bytes(Context const& context, DataType dtype,
                                          std::int64_t num_sequences,
                                          std::array<std::int64_t, 3> const& q_shape,
                                          std::array<std::int64_t, 3> const& k_shape,
                                          AttendOptions const& options);

}  // namespace sparsek
