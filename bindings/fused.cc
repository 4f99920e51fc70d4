// Stages 1 to 3 in one call on torch tensors, dense and packed: what attention without gradients
// runs.
//
// Small calls cost the host what this function costs: reading the tensors, two allocations and the
// launches. Everything that lives between the stages is one buffer.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "arguments.hpp"
#include "sparsek/attend.hpp"
#include "sparsek/error.hpp"
#include "sparsek/score.hpp"
#include "sparsek/select.hpp"
#include "torch_tensor.hpp"

namespace sparsek::bindings {
namespace {

template <std::size_t Rank>
using Shape = std::array<std::int64_t, Rank>;

template <std::size_t Rank>
std::size_t aligned_bytes(Shape<Rank> const& shape, DataType dtype) {
  std::size_t bytes = size_of(dtype);
  for (std::int64_t const size : shape) bytes *= static_cast<std::size_t>(size);
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

template <std::size_t Rank>
std::string text_of(Shape<Rank> const& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < Rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Scores go with q and k; select, which sees scores alone, could not tell.
template <std::size_t Rank>
void check_scores(ConstTensorView<Rank> const& scores, DataType dtype, Shape<Rank> const& shape) {
  if (scores.dtype != dtype) {
    throw InvalidArgument(std::string("scores: expected dtype ") +
                          (dtype == DataType::kFloat64 ? "float64, as q" : "float32") + ", got " +
                          name_of(scores.dtype));
  }
  if (scores.shape != shape) {
    throw InvalidArgument("scores: expected shape " + text_of(shape) + ", as k, got " +
                          text_of(scores.shape));
  }
}

// What lives between the stages, in one buffer: [scores | expiry | threshold | workspace].
// last_candidate is left out: only a backward reads it.
template <std::size_t Rank>
class Between {
 public:
  Between(Place const& place, std::optional<ConstTensorView<Rank>> const& given_scores,
          DataType score_dtype, Shape<Rank> const& scores_shape, Shape<Rank> const& expiry_shape,
          Shape<Rank> const& threshold_shape, std::size_t workspace_bytes)
      : expiry_at_(given_scores ? 0 : aligned_bytes(scores_shape, score_dtype)),
        threshold_at_(expiry_at_ + aligned_bytes(expiry_shape, DataType::kInt32)),
        workspace_at_(threshold_at_ + aligned_bytes(threshold_shape, score_dtype)),
        workspace_bytes_(workspace_bytes),
        bytes_(place, workspace_at_ + workspace_bytes),
        made_scores(bytes_.data(), score_dtype, scores_shape),
        scores(given_scores ? *given_scores : made_scores),
        expiry(bytes_.data() + expiry_at_, DataType::kInt32, expiry_shape),
        threshold(bytes_.data() + threshold_at_, score_dtype, threshold_shape) {}

  // Runs a stage, which has the whole workspace. On CUDA there is no other memory, so that none is
  // taken behind torch's back; on the CPU it is the heap.
  template <typename Stage>
  void run(Context context, Stage&& stage) const {
    BufferAllocator allocator(bytes_.data() + workspace_at_, workspace_bytes_);
    if (context.device.type == DeviceType::kCuda) context.allocator = &allocator;
    stage(context);
  }

 private:
  std::size_t expiry_at_, threshold_at_, workspace_at_, workspace_bytes_;
  Bytes bytes_;

 public:
  TensorView<Rank> made_scores;  // where the call has none
  ConstTensorView<Rank> scores;  // the call's, or those
  TensorView<Rank> expiry, threshold;
};

// out like q; lse without q's last dimension, where it is wanted.
template <std::size_t Rank>
struct Outputs {
  nb::object out, lse = nb::none();
  TensorView<Rank> out_view;
  std::optional<TensorView<Rank - 1>> lse_view;

  Outputs(Place const& place, nb::handle q, DataType score_dtype, bool return_lse)
      : out(empty_like(q)), out_view(place.read_output<Rank>(out, {"out", ""})) {
    if (!return_lse) return;
    lse = empty_rows_of(q, score_dtype);
    lse_view = place.read_output<Rank - 1>(lse, {"lse", ""});
  }
  nb::tuple results() const { return nb::make_tuple(out, lse); }
};

DataType score_dtype_of(DataType dtype) {
  return dtype == DataType::kFloat64 ? DataType::kFloat64 : DataType::kFloat32;
}

nb::tuple attention_forward(nb::handle q_tensor, nb::handle k_tensor, nb::handle v_tensor,
                            OptionalTensor const& scores_tensor,
                            OptionalTensor const& lengths_tensor, std::int64_t num_selected,
                            std::int64_t window, std::int64_t chunk_size,
                            std::optional<std::int64_t> num_candidates, int gate,
                            std::optional<double> sm_scale, bool return_lse, int backend) {
  SelectOptions const selection{num_selected, window, chunk_size, num_candidates};
  AttendOptions const options{
      .gate = static_cast<Gate>(gate), .sm_scale = sm_scale, .selection = selection};
  Place const place(q_tensor, static_cast<Backend>(backend));
  auto const q = place.read<4>(q_tensor, {"q", "B, Hq, Sq, D"});
  auto const k = place.read<4>(k_tensor, {"k", "B, Hkv, Sk, D"});
  auto const v = place.read<4>(v_tensor, {"v", "B, Hkv, Sk, D"});
  auto const scores = place.read_optional<3>(scores_tensor, {"scores", "B, Hkv, Sk"});
  auto const lengths = place.read_optional<1>(lengths_tensor, {"lengths", "B"});
  Context const& context = place.context();
  auto const [batch, heads, seq_len, dim] = k.shape;
  // Asking for sizes also checks shapes, dtypes and options against each other, before any stage
  // has run.
  std::size_t const workspace_bytes =
      std::max(attend_workspace_bytes(context, q.dtype, q.shape, k.shape, options),
               select_workspace_bytes(context, batch, heads, seq_len, selection));
  std::int64_t const num_chunks = (seq_len + selection.chunk_size - 1) / selection.chunk_size;
  DataType const score_dtype = score_dtype_of(q.dtype);
  Shape<3> const row{batch, heads, seq_len};
  if (scores) check_scores(*scores, score_dtype, row);
  Outputs<4> const outputs(place, q_tensor, score_dtype, return_lse);
  {
    nb::gil_scoped_release const release;
    Between<3> const between(place, scores, score_dtype, row, row, {batch, heads, num_chunks},
                             workspace_bytes);
    if (!scores) {
      between.run(context,
                  [&](Context const& c) { key_norm_scores(c, k, lengths, between.made_scores); });
    }
    between.run(context, [&](Context const& c) {
      select(c, between.scores, lengths, selection,
             {between.expiry, between.threshold, std::nullopt});
    });
    ConstSelectionView made(between.expiry);
    made.threshold = between.threshold;
    between.run(context, [&](Context const& c) {
      attend(c, q, k, v, between.scores, made, lengths, options, outputs.out_view,
             outputs.lse_view);
    });
  }
  return outputs.results();
}

nb::tuple attention_varlen_forward(nb::handle q_tensor, nb::handle k_tensor, nb::handle v_tensor,
                                   OptionalTensor const& scores_tensor, nb::handle starts_q_tensor,
                                   nb::handle starts_k_tensor, std::int64_t num_selected,
                                   std::int64_t window, std::int64_t chunk_size,
                                   std::optional<std::int64_t> num_candidates, int gate,
                                   std::optional<double> sm_scale, bool return_lse, int backend) {
  SelectOptions const selection{num_selected, window, chunk_size, num_candidates};
  AttendOptions const options{
      .gate = static_cast<Gate>(gate), .sm_scale = sm_scale, .selection = selection};
  Place const place(q_tensor, static_cast<Backend>(backend));
  auto const q = place.read<3>(q_tensor, {"q", "total_q, Hq, D"});
  auto const k = place.read<3>(k_tensor, {"k", "total_k, Hkv, D"});
  auto const v = place.read<3>(v_tensor, {"v", "total_k, Hkv, D"});
  auto const starts_q = place.read<1>(starts_q_tensor, {"cu_seqlens_q", "N + 1"});
  auto const starts_k = place.read<1>(starts_k_tensor, {"cu_seqlens_k", "N + 1"});
  auto const scores = place.read_optional<2>(scores_tensor, {"scores", "total_k, Hkv"});
  for (auto const& [name, starts] : {std::pair{"q", &starts_q}, {"k", &starts_k}}) {
    if (starts->shape[0] == 0 || starts->shape != starts_q.shape) {
      throw InvalidArgument(std::string("cu_seqlens_") + name +
                            ": expected shape [N + 1], the same for queries and keys, got " +
                            text_of(starts_q.shape) + " and " + text_of(starts_k.shape));
    }
  }
  Context const& context = place.context();
  auto const [total_k, heads, dim] = k.shape;
  std::int64_t const num_sequences = starts_k.shape[0] - 1;
  std::size_t const workspace_bytes = std::max(
      attend_varlen_workspace_bytes(context, q.dtype, num_sequences, q.shape, k.shape, options),
      select_varlen_workspace_bytes(context, num_sequences, heads, total_k, selection));
  DataType const score_dtype = score_dtype_of(q.dtype);
  Shape<2> const scores_shape{total_k, heads};
  if (scores) check_scores(*scores, score_dtype, scores_shape);
  Outputs<3> const outputs(place, q_tensor, score_dtype, return_lse);
  {
    nb::gil_scoped_release const release;
    Between<2> const between(place, scores, score_dtype, scores_shape, {heads, total_k},
                             {heads, total_k / selection.chunk_size + num_sequences},
                             workspace_bytes);
    if (!scores) {
      between.run(context,
                  [&](Context const& c) { key_norm_scores_varlen(c, k, between.made_scores); });
    }
    between.run(context, [&](Context const& c) {
      select_varlen(c, between.scores, starts_k, selection,
                    {between.expiry, between.threshold, std::nullopt});
    });
    ConstPackedSelectionView made(between.expiry);
    made.threshold = between.threshold;
    between.run(context, [&](Context const& c) {
      attend_varlen(c, q, k, v, between.scores, made, starts_q, starts_k, options, outputs.out_view,
                    outputs.lse_view);
    });
  }
  return outputs.results();
}

}  // namespace

void define_fused(nb::module_& module) {
  connect_torch();
  module.def("attention_forward", &attention_forward);
  module.def("attention_varlen_forward", &attention_varlen_forward);
  module.def("need_no_dispatcher", &need_no_dispatcher);
}

}  // namespace sparsek::bindings
