// Stage 2, select.
#include "sparsek/select.hpp"

#include "arguments.hpp"

namespace sparsek::bindings {

void define_select(nb::module_& module) {
  module.def("select", [](Call const& call, ConstTensorView<3> const& scores,
                          std::optional<ConstTensorView<1>> const& lengths,
                          std::int64_t num_selected, std::int64_t window, std::int64_t chunk_size,
                          std::optional<std::int64_t> num_candidates, TensorView<3> const& expiry,
                          TensorView<3> const& threshold,
                          std::optional<TensorView<3>> const& last_candidate) {
    SelectOptions const options{num_selected, window, chunk_size, num_candidates};
    run(call, [&](Context const& context) {
      select(context, scores, lengths, options, {expiry, threshold, last_candidate});
    });
  });
  module.def("select_workspace_bytes",
             [](Call const& call, std::int64_t batch_size, std::int64_t num_kv_heads,
                std::int64_t seq_len, std::int64_t num_selected, std::int64_t window,
                std::int64_t chunk_size, std::optional<std::int64_t> num_candidates) {
               return select_workspace_bytes(call.context, batch_size, num_kv_heads, seq_len,
                                             {num_selected, window, chunk_size, num_candidates});
             });
  module.def("select_varlen", [](Call const& call, ConstTensorView<2> const& scores,
                                 ConstTensorView<1> const& cu_seqlens_k, std::int64_t num_selected,
                                 std::int64_t window, std::int64_t chunk_size,
                                 std::optional<std::int64_t> num_candidates,
                                 TensorView<2> const& expiry, TensorView<2> const& threshold,
                                 std::optional<TensorView<2>> const& last_candidate) {
    SelectOptions const options{num_selected, window, chunk_size, num_candidates};
    run(call, [&](Context const& context) {
      select_varlen(context, scores, cu_seqlens_k, options, {expiry, threshold, last_candidate});
    });
  });
  module.def("select_varlen_workspace_bytes",
             [](Call const& call, std::int64_t num_sequences, std::int64_t num_kv_heads,
                std::int64_t total_k, std::int64_t num_selected, std::int64_t window,
                std::int64_t chunk_size, std::optional<std::int64_t> num_candidates) {
               return select_varlen_workspace_bytes(
                   call.context, num_sequences, num_kv_heads, total_k,
                   {num_selected, window, chunk_size, num_candidates});
             });
}

}  // namespace sparsek::bindings
