// Stage 5, decode.
#include "sparsek/decode.hpp"

#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.hpp"

namespace sparsek::bindings {
namespace {

// A pool as Python passes it: (data_ptr, number of blocks, bytes from one to the next).
using Pool = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

DecodeStateView state_of(Pool const& pool, ConstTensorView<1> const& block_index,
                         std::optional<ConstTensorView<1>> const& continues) {
  auto const [data, num_blocks, stride_block] = pool;
  return {reinterpret_cast<void*>(data), num_blocks, stride_block, block_index, continues};
}

DecodeOptions options_of(SelectOptions const& selection, int gate, std::optional<double> sm_scale) {
  return {selection, static_cast<Gate>(gate), sm_scale};
}

}  // namespace

void define_decode(nb::module_& module) {
  module.def(
      "decode_state_layout",
      [](int dtype, std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t num_selected,
         std::int64_t window, std::int64_t chunk_size, std::optional<std::int64_t> num_candidates) {
        DecodeStateLayout const layout =
            decode_state_layout(static_cast<DataType>(dtype), num_kv_heads, head_dim,
                                {num_selected, window, chunk_size, num_candidates});
        nb::dict fields;
        fields["num_candidates"] = layout.num_candidates;
        fields["num_rows"] = layout.num_rows;
        fields["candidates_offset"] = layout.candidates_offset;
        fields["positions_offset"] = layout.positions_offset;
        fields["scores_offset"] = layout.scores_offset;
        fields["k_offset"] = layout.k_offset;
        fields["v_offset"] = layout.v_offset;
        fields["head_bytes"] = layout.head_bytes;
        fields["block_bytes"] = layout.block_bytes;
        return fields;
      });
  module.def("decode_workspace_bytes",
             [](Call const& call, int dtype, std::int64_t num_sequences, std::int64_t num_kv_heads,
                std::int64_t head_dim, std::int64_t num_selected, std::int64_t window,
                std::int64_t chunk_size, std::optional<std::int64_t> num_candidates) {
               return decode_workspace_bytes(call.context, static_cast<DataType>(dtype),
                                             num_sequences, num_kv_heads, head_dim,
                                             {num_selected, window, chunk_size, num_candidates});
             });
  module.def(
      "decode",
      [](Call const& call, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
         ConstTensorView<4> const& v, ConstTensorView<3> const& scores,
         std::optional<ConstTensorView<1>> const& lengths, Pool const& pool,
         ConstTensorView<1> const& block_index, std::optional<ConstTensorView<1>> const& continues,
         std::int64_t num_selected, std::int64_t window, std::int64_t chunk_size,
         std::optional<std::int64_t> num_candidates, int gate, std::optional<double> sm_scale,
         TensorView<4> const& out, std::optional<TensorView<3>> const& lse) {
        auto const options =
            options_of({num_selected, window, chunk_size, num_candidates}, gate, sm_scale);
        auto const state = state_of(pool, block_index, continues);
        run(call, [&](Context const& context) {
          decode(context, q, k, v, scores, lengths, options, state, out, lse);
        });
      });
  module.def(
      "decode_append",
      [](Call const& call, ConstTensorView<4> const& k, ConstTensorView<4> const& v,
         ConstTensorView<3> const& scores, std::optional<ConstTensorView<1>> const& lengths,
         Pool const& pool, ConstTensorView<1> const& block_index,
         std::optional<ConstTensorView<1>> const& continues, std::int64_t num_selected,
         std::int64_t window, std::int64_t chunk_size, std::optional<std::int64_t> num_candidates) {
        SelectOptions const options{num_selected, window, chunk_size, num_candidates};
        auto const state = state_of(pool, block_index, continues);
        run(call, [&](Context const& context) {
          decode_append(context, k, v, scores, lengths, options, state);
        });
      });
  module.def(
      "decode_varlen",
      [](Call const& call, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
         ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
         ConstTensorView<1> const& cu_seqlens, Pool const& pool,
         ConstTensorView<1> const& block_index, std::optional<ConstTensorView<1>> const& continues,
         std::int64_t num_selected, std::int64_t window, std::int64_t chunk_size,
         std::optional<std::int64_t> num_candidates, int gate, std::optional<double> sm_scale,
         TensorView<3> const& out, std::optional<TensorView<2>> const& lse) {
        auto const options =
            options_of({num_selected, window, chunk_size, num_candidates}, gate, sm_scale);
        auto const state = state_of(pool, block_index, continues);
        run(call, [&](Context const& context) {
          decode_varlen(context, q, k, v, scores, cu_seqlens, options, state, out, lse);
        });
      });
  module.def(
      "decode_append_varlen",
      [](Call const& call, ConstTensorView<3> const& k, ConstTensorView<3> const& v,
         ConstTensorView<2> const& scores, ConstTensorView<1> const& cu_seqlens, Pool const& pool,
         ConstTensorView<1> const& block_index, std::optional<ConstTensorView<1>> const& continues,
         std::int64_t num_selected, std::int64_t window, std::int64_t chunk_size,
         std::optional<std::int64_t> num_candidates) {
        SelectOptions const options{num_selected, window, chunk_size, num_candidates};
        auto const state = state_of(pool, block_index, continues);
        run(call, [&](Context const& context) {
          decode_append_varlen(context, k, v, scores, cu_seqlens, options, state);
        });
      });
}

}  // namespace sparsek::bindings
