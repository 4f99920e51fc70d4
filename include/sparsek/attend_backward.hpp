// Stage 4, attend_backward: exact gradients of attend in q, k, v and the scores.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "sparsek/attend.hpp"

namespace sparsek {

// With g_ij = dL/dm_ij for selected j and I_c = {j in T_c : 0 < u_j - tau_c < 1} (empty if tau_c is
// infinite):
//   dL/du_j = sum_{i : j in I_c(i), selected} g_ij - sum_{i : j in I_c(i)} gbar_i,
//   gbar_i  = sum_{l in I_c selected} g_il / |I_c|
// where gate kSoftmax has g_ij = exp(s_ij - lse_i)(do_i . v_j - delta_i), delta_i = do_i . o_i, and
// gate kValue has g_ij = p_ij (do_i . v_j) and ds_ij = p_ij (m_ij do_i . v_j - delta_i). dq, dk, dv
// as in FlashAttention-2 (arXiv 2307.08691) with mask and gate applied. Query heads of a group add
// up.
//
// q, k, v, scores, selection, lengths, options  as attend took them (selection.last_candidate is
//                                               needed for dscores)
// out, lse    as attend wrote them
// dout        like q: the gradient of the loss in out
// dq, dk, dv  out: like q, k, v
// dscores     float32 [B, Hkv, Sk] out or none, contiguous
//
// Throws as attend does. Deterministic: two calls give the same bits.
void attend_backward(Context const& context, ConstTensorView<4> const& q,
                     ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                     std::optional<ConstTensorView<3>> const& scores,
                     ConstSelectionView const& selection,
                     std::optional<ConstTensorView<1>> const& lengths, AttendOptions const& options,
                     ConstTensorView<4> const& out, ConstTensorView<3> const& lse,
                     ConstTensorView<4> const& dout, TensorView<4> const& dq,
                     TensorView<4> const& dk, TensorView<4> const& dv,
                     std::optional<TensorView<3>> const& dscores);

// Bytes that attend_backward takes from the context's allocator for this problem, dscores included.
std::size_t attend_backward_workspace_bytes(Context const& context, DataType dtype,
                                            std::array<std::int64_t, 4> const& q_shape,
                                            std::array<std::int64_t, 4> const& k_shape,
                                            AttendOptions const& options);

// The gradients of attend_varlen: equals one attend_backward per sequence. Tensors as attend_varlen
// takes them.
//
// dout, dq  like q; dk, dv  like k
// dscores   float32 [total_k, Hkv] out or none, contiguous
void attend_backward_varlen(Context const& context, ConstTensorView<3> const& q,
                            ConstTensorView<3> const& k, ConstTensorView<3> const& v,
                            std::optional<ConstTensorView<2>> const& scores,
                            ConstPackedSelectionView const& selection,
                            ConstTensorView<1> const& cu_seqlens_q,
                            ConstTensorView<1> const& cu_seqlens_k, AttendOptions const& options,
                            ConstTensorView<3> const& out, ConstTensorView<2> const& lse,
                            ConstTensorView<3> const& dout, TensorView<3> const& dq,
                            TensorView<3> const& dk, TensorView<3> const& dv,
                            std::optional<TensorView<2>> const& dscores);

// q_shape [total_q, Hq, D], k_shape [total_k, Hkv, D].
std::size_t attend_backward_varlen_workspace_bytes(Context const& context, DataType dtype,
                                                   std::int64_t num_sequences,
                                                   std::array<std::int64_t, 3> const& q_shape,
                                                   std::array<std::int64_t, 3> const& k_shape,
                                                   AttendOptions const& options);

}  // namespace sparsek
