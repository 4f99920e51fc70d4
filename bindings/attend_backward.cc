// Stage 4, attend_backward.
#include "sparsek/attend_backward.hpp"

#include <nanobind/stl/array.h>

#include "arguments.hpp"

namespace sparsek::bindings {

void define_attend_backward(nb::module_& module) {
  module.def(
      "attend_backward",
      [](Call const& call, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
         ConstTensorView<4> const& v, std::optional<ConstTensorView<3>> const& scores,
         ConstTensorView<3> const& expiry, std::optional<ConstTensorView<3>> const& threshold,
         std::optional<ConstTensorView<3>> const& last_candidate,
         std::optional<ConstTensorView<1>> const& lengths, std::int64_t num_selected,
         std::int64_t window, std::int64_t chunk_size, std::optional<std::int64_t> num_candidates,
         bool is_foreign, std::optional<std::int64_t> max_keys_per_tile, int gate,
         std::optional<double> sm_scale, ConstTensorView<4> const& out,
         ConstTensorView<3> const& lse, ConstTensorView<4> const& dout, TensorView<4> const& dq,
         TensorView<4> const& dk, TensorView<4> const& dv,
         std::optional<TensorView<3>> const& dscores) {
        ConstSelectionView selection(expiry);
        selection.threshold = threshold;
        selection.last_candidate = last_candidate;
        AttendOptions const options{static_cast<Gate>(gate),
                                    sm_scale,
                                    {num_selected, window, chunk_size, num_candidates},
                                    origin_of(is_foreign),
                                    max_keys_per_tile};
        run(call, [&](Context const& context) {
          attend_backward(context, q, k, v, scores, selection, lengths, options, out, lse, dout, dq,
                          dk, dv, dscores);
        });
      });
  module.def(
      "attend_backward_workspace_bytes",
      [](Call const& call, int dtype, std::array<std::int64_t, 4> const& q_shape,
         std::array<std::int64_t, 4> const& k_shape, std::int64_t num_selected, std::int64_t window,
         std::int64_t chunk_size, std::optional<std::int64_t> num_candidates, bool is_foreign,
         std::optional<std::int64_t> max_keys_per_tile, int gate) {
        AttendOptions const options{static_cast<Gate>(gate),
                                    std::nullopt,
                                    {num_selected, window, chunk_size, num_candidates},
                                    origin_of(is_foreign),
                                    max_keys_per_tile};
        return attend_backward_workspace_bytes(call.context, static_cast<DataType>(dtype), q_shape,
                                               k_shape, options);
      });
  module.def(
      "attend_backward_varlen",
      [](Call const& call, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
         ConstTensorView<3> const& v, std::optional<ConstTensorView<2>> const& scores,
         ConstTensorView<2> const& expiry, std::optional<ConstTensorView<2>> const& threshold,
         std::optional<ConstTensorView<2>> const& last_candidate,
         ConstTensorView<1> const& cu_seqlens_q, ConstTensorView<1> const& cu_seqlens_k,
         std::int64_t num_selected, std::int64_t window, std::int64_t chunk_size,
         std::optional<std::int64_t> num_candidates, int gate, std::optional<double> sm_scale,
         ConstTensorView<3> const& out, ConstTensorView<2> const& lse,
         ConstTensorView<3> const& dout, TensorView<3> const& dq, TensorView<3> const& dk,
         TensorView<3> const& dv, std::optional<TensorView<2>> const& dscores) {
        ConstPackedSelectionView selection(expiry);
        selection.threshold = threshold;
        selection.last_candidate = last_candidate;
        AttendOptions const options{
            static_cast<Gate>(gate), sm_scale, {num_selected, window, chunk_size, num_candidates}};
        run(call, [&](Context const& context) {
          attend_backward_varlen(context, q, k, v, scores, selection, cu_seqlens_q, cu_seqlens_k,
                                 options, out, lse, dout, dq, dk, dv, dscores);
        });
      });
  module.def(
      "attend_backward_varlen_workspace_bytes",
      [](Call const& call, int dtype, std::int64_t num_sequences,
         std::array<std::int64_t, 3> const& q_shape, std::array<std::int64_t, 3> const& k_shape,
         std::int64_t num_selected, std::int64_t window, std::int64_t chunk_size,
         std::optional<std::int64_t> num_candidates, int gate) {
        AttendOptions const options{static_cast<Gate>(gate),
                                    std::nullopt,
                                    {num_selected, window, chunk_size, num_candidates}};
        return attend_backward_varlen_workspace_bytes(call.context, static_cast<DataType>(dtype),
                                                      num_sequences, q_shape, k_shape, options);
      });
}

}  // namespace sparsek::bindings
