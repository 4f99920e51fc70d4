#include "validate.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "checks.hpp"
#include "sparsek/error.hpp"

namespace sparsek {
namespace {

void check_finite(Context const& context, SelectProblem const& p) {
  if (!is_host(context)) return;
  for (std::int64_t b = 0; b < (p.cu_seqlens_k ? 1 : p.batch); ++b) {
    std::int64_t const valid = p.lengths ? p.lengths[b] : p.seq_len;
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) {
      std::int64_t const row = b * p.stride_scores_batch + h * p.stride_scores_head;
      bool const is_float = p.score_dtype == DataType::kFloat32;
      if (is_float && p.stride_scores_position == 1 &&
          is_finite_row(static_cast<float const*>(p.scores) + row, valid)) {
        continue;
      }
      for (std::int64_t j = 0; j < valid; ++j) {
        std::int64_t const at = row + j * p.stride_scores_position;
        double const u = is_float ? static_cast<float const*>(p.scores)[at]
                                  : static_cast<double const*>(p.scores)[at];
        if (!std::isfinite(u)) {
          fail("scores", "finite values",
               std::to_string(u) + " at batch " + std::to_string(b) + ", head " +
                   std::to_string(h) + ", position " + std::to_string(j));
        }
      }
    }
  }
}

// Values beyond the sequence mean the same as the sequence's end; clamping keeps later arithmetic
// small.
template <typename Problem>
void set_configuration(Problem& p, SelectOptions const& options, std::int64_t seq_len) {
  p.num_selected = std::min(options.num_selected, seq_len);
  p.window = std::min(options.window, seq_len);
  p.chunk_size = std::min(options.chunk_size, seq_len + 1);
  p.num_candidates = std::min(resolved_num_candidates(options), seq_len);
}

std::int64_t num_chunks_dense(std::int64_t seq_len, std::int64_t chunk_size) {
  return (seq_len + chunk_size - 1) / chunk_size;
}
std::int64_t num_chunks_packed(std::int64_t total, std::int64_t chunk_size,
                               std::int64_t num_sequences) {
  return total / chunk_size + num_sequences;
}

template <std::size_t Rank>
void check_selection_tensor(char const* name, char const* dims, ConstTensorView<Rank> const& t,
                            std::array<std::int64_t, Rank> const& shape, DataType dtype) {
  expect_shape(name, dims, t, shape);
  expect_dtype(name, t, dtype);
  expect_contiguous(name, t);
}

template <std::size_t Rank>
struct SelectionNames;
template <>
struct SelectionNames<3> {
  static constexpr char const* kExpiry = "[B, Hkv, Sk]";
  static constexpr char const* kChunks = "[B, Hkv, ceil(Sk / chunk_size)]";
};
template <>
struct SelectionNames<2> {
  static constexpr char const* kExpiry = "[Hkv, total_k]";
  static constexpr char const* kChunks = "[Hkv, total_k / chunk_size + N]";
};

template <std::size_t Rank>
void fill_select_outputs(SelectProblem& p, BasicSelectionView<Rank> const& s,
                         std::array<std::int64_t, Rank> const& expiry_shape,
                         std::array<std::int64_t, Rank> const& chunk_shape) {
  using Names = SelectionNames<Rank>;
  check_selection_tensor<Rank>("expiry", Names::kExpiry, s.expiry, expiry_shape, DataType::kInt32);
  check_selection_tensor<Rank>("threshold", Names::kChunks, s.threshold, chunk_shape,
                               p.score_dtype);
  if (s.last_candidate) {
    check_selection_tensor<Rank>("last_candidate", Names::kChunks, *s.last_candidate, chunk_shape,
                                 DataType::kInt32);
  }
  p.expiry = static_cast<std::int32_t*>(s.expiry.data);
  p.threshold = s.threshold.data;
  p.last_candidate =
      s.last_candidate ? static_cast<std::int32_t*>(s.last_candidate->data) : nullptr;
}

template <typename Problem>
void set_selection_strides(Problem& p, bool packed, std::int64_t seq_len) {
  p.stride_expiry_batch = packed ? 0 : p.num_kv_heads * seq_len;
  p.stride_expiry_head = seq_len;
  p.stride_chunk_batch = packed ? 0 : p.num_kv_heads * p.num_chunks;
  p.stride_chunk_head = p.num_chunks;
}

std::string gate_name(Gate gate) {
  return gate == Gate::kNone ? "none" : gate == Gate::kValue ? "value" : "softmax";
}

// What does not depend on how the batch is laid out: configuration, gate, selection.
template <std::size_t Rank>
void fill_attend_selection(AttendProblem& p, AttendOptions const& options,
                           BasicConstSelectionView<Rank> const& s, bool has_scores,
                           std::int64_t num_sequences) {
  using Names = SelectionNames<Rank>;
  constexpr bool kPacked = Rank == 2;
  bool const foreign = !s.threshold || options.origin == SelectionOrigin::kForeign;
  if (foreign) {
    if (options.gate != Gate::kNone) {
      fail("gate", "none for a selection without thresholds", gate_name(options.gate));
    }
    p.num_selected = -1;
    p.window = 0;
    p.chunk_size = 1;
    p.num_candidates = 0;
    p.max_keys_per_tile = options.max_keys_per_tile.value_or(-1);
    if (options.max_keys_per_tile && *options.max_keys_per_tile < 0) {
      fail("max_keys_per_tile", "a number >= 0", std::to_string(*options.max_keys_per_tile));
    }
  } else {
    check_select_options(options.selection);
    set_configuration(p, options.selection, p.seq_len_k);
    p.max_keys_per_tile = -1;
  }
  p.num_chunks = kPacked ? num_chunks_packed(p.seq_len_k, p.chunk_size, num_sequences)
                         : num_chunks_dense(p.seq_len_k, p.chunk_size);
  set_selection_strides(p, kPacked, p.seq_len_k);
  std::array<std::int64_t, Rank> expiry_shape, chunk_shape;
  if constexpr (kPacked) {
    expiry_shape = {p.num_kv_heads, p.seq_len_k};
    chunk_shape = {p.num_kv_heads, p.num_chunks};
  } else {
    expiry_shape = {p.batch, p.num_kv_heads, p.seq_len_k};
    chunk_shape = {p.batch, p.num_kv_heads, p.num_chunks};
  }
  check_selection_tensor<Rank>("expiry", Names::kExpiry, s.expiry, expiry_shape, DataType::kInt32);
  p.expiry = static_cast<std::int32_t const*>(s.expiry.data);
  if (!foreign) {
    check_selection_tensor<Rank>("threshold", Names::kChunks, *s.threshold, chunk_shape,
                                 p.score_dtype);
  }
  if (s.last_candidate) {
    check_selection_tensor<Rank>("last_candidate", Names::kChunks, *s.last_candidate, chunk_shape,
                                 DataType::kInt32);
    p.last_candidate = static_cast<std::int32_t const*>(s.last_candidate->data);
  }
  p.gate = options.gate;
  if (p.gate != Gate::kNone) {
    if (!has_scores) fail("scores", "a tensor with gate " + gate_name(p.gate), "none");
    p.threshold = s.threshold->data;
  }
  p.sm_scale = options.sm_scale.value_or(
      1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(1, p.head_dim))));
  if (!std::isfinite(p.sm_scale)) fail("sm_scale", "a finite number", std::to_string(p.sm_scale));
}

}  // namespace

std::int64_t resolved_num_candidates(SelectOptions const& options) {
  return options.num_candidates.value_or(4 * options.num_selected);
}

void check_select_options(SelectOptions const& o) {
  constexpr std::int64_t kMax = std::int64_t{1} << 60;  // 4 k must not overflow
  auto const expect = [](char const* name, std::int64_t value, std::int64_t least) {
    if (value < least || value > kMax) {
      fail(name, "a number >= " + std::to_string(least), std::to_string(value));
    }
  };
  expect("num_selected", o.num_selected, 0);
  expect("window", o.window, 0);
  expect("chunk_size", o.chunk_size, 1);
  if (o.num_candidates && (*o.num_candidates < o.num_selected || *o.num_candidates > kMax)) {
    fail("num_candidates", "at least num_selected = " + std::to_string(o.num_selected),
         std::to_string(*o.num_candidates));
  }
}

// --- score
// -----------------------------------------------------------------------------------------------------------

ScoreProblem make_score_problem(Context const& context, ConstTensorView<4> const& k,
                                std::optional<ConstTensorView<1>> const& lengths,
                                TensorView<3> const& scores) {
  check_context(context);
  expect_data("k", k);
  expect_float_dtype(context, "k", k.dtype);
  expect_contiguous_rows("k", k);
  auto const [batch, heads, seq_len, dim] = k.shape;
  check_seq_len("k", seq_len);
  expect_shape<3>("scores", "[B, Hkv, Sk]", scores, {batch, heads, seq_len});
  expect_dtype<3>("scores", scores, score_dtype_for(k.dtype));
  expect_writable<3>("scores", scores);
  ScoreProblem p{};
  p.batch = batch, p.num_kv_heads = heads, p.seq_len = seq_len, p.head_dim = dim;
  p.dtype = k.dtype, p.k = k.data;
  p.stride_k_batch = k.stride[0], p.stride_k_head = k.stride[1], p.stride_k_position = k.stride[2];
  p.lengths = check_lengths(context, lengths, batch, seq_len);
  p.score_dtype = scores.dtype, p.scores = scores.data;
  p.stride_scores_batch = scores.stride[0], p.stride_scores_head = scores.stride[1];
  p.stride_scores_position = scores.stride[2];
  return p;
}

ScoreProblem make_score_problem(Context const& context, ConstTensorView<3> const& k,
                                TensorView<2> const& scores) {
  check_context(context);
  expect_data("k", k);
  expect_float_dtype(context, "k", k.dtype);
  expect_contiguous_rows("k", k);
  auto const [total, heads, dim] = k.shape;
  check_seq_len("k", total);
  expect_shape<2>("scores", "[total_k, Hkv]", scores, {total, heads});
  expect_dtype<2>("scores", scores, score_dtype_for(k.dtype));
  expect_writable<2>("scores", scores);
  // A key's score does not depend on its sequence: one long row.
  ScoreProblem p{};
  p.batch = 1, p.num_kv_heads = heads, p.seq_len = total, p.head_dim = dim;
  p.dtype = k.dtype, p.k = k.data;
  p.stride_k_head = k.stride[1], p.stride_k_position = k.stride[0];
  p.score_dtype = scores.dtype, p.scores = scores.data;
  p.stride_scores_head = scores.stride[1], p.stride_scores_position = scores.stride[0];
  return p;
}

// --- select
// ----------------------------------------------------------------------------------------------------------

SelectProblem make_select_problem(Context const& context, ConstTensorView<3> const& scores,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  SelectOptions const& options, SelectionView const& selection) {
  check_context(context);
  check_select_options(options);
  check_score_dtype(context, "scores", scores.dtype);
  expect_data("scores", scores);
  auto const [batch, heads, seq_len] = scores.shape;
  check_seq_len("scores", seq_len);
  SelectProblem p{};
  p.batch = batch, p.num_kv_heads = heads, p.seq_len = seq_len;
  set_configuration(p, options, seq_len);
  p.num_chunks = num_chunks_dense(seq_len, p.chunk_size);
  p.score_dtype = scores.dtype, p.scores = scores.data;
  p.stride_scores_batch = scores.stride[0], p.stride_scores_head = scores.stride[1];
  p.stride_scores_position = scores.stride[2];
  p.lengths = check_lengths(context, lengths, batch, seq_len);
  set_selection_strides(p, false, seq_len);
  fill_select_outputs<3>(p, selection, {batch, heads, seq_len}, {batch, heads, p.num_chunks});
  check_finite(context, p);
  return p;
}

SelectProblem make_select_problem(Context const& context, ConstTensorView<2> const& scores,
                                  ConstTensorView<1> const& cu_seqlens_k,
                                  SelectOptions const& options,
                                  PackedSelectionView const& selection) {
  check_context(context);
  check_select_options(options);
  check_score_dtype(context, "scores", scores.dtype);
  expect_data("scores", scores);
  auto const [total, heads] = scores.shape;
  check_seq_len("scores", total);
  SelectProblem p{};
  p.cu_seqlens_k = check_cu_seqlens(context, "cu_seqlens_k", cu_seqlens_k, total);
  p.batch = cu_seqlens_k.shape[0] - 1, p.num_kv_heads = heads, p.seq_len = total;
  set_configuration(p, options, total);
  p.num_chunks = num_chunks_packed(total, p.chunk_size, p.batch);
  p.score_dtype = scores.dtype, p.scores = scores.data;
  p.stride_scores_head = scores.stride[1], p.stride_scores_position = scores.stride[0];
  set_selection_strides(p, true, total);
  fill_select_outputs<2>(p, selection, {heads, total}, {heads, p.num_chunks});
  check_finite(context, p);
  return p;
}

// --- attend
// ----------------------------------------------------------------------------------------------------------

AttendProblem make_attend_problem(Context const& context, ConstTensorView<4> const& q,
                                  ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                                  std::optional<ConstTensorView<3>> const& scores,
                                  ConstSelectionView const& selection,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  AttendOptions const& options, ConstTensorView<4> const& out,
                                  std::optional<ConstTensorView<3>> const& lse) {
  check_context(context);
  expect_float_dtype(context, "q", q.dtype);
  expect_data("q", q);
  expect_data("k", k);
  auto const [batch, num_q_heads, seq_len_q, dim] = q.shape;
  std::int64_t const num_kv_heads = k.shape[1], seq_len_k = k.shape[2];
  expect_shape("k", "[B, Hkv, Sk, D]", k, {batch, num_kv_heads, seq_len_k, dim});
  expect_shape("v", "[B, Hkv, Sk, D]", v, {batch, num_kv_heads, seq_len_k, dim});
  expect_dtype("k", k, q.dtype);
  expect_dtype("v", v, q.dtype);
  check_heads(num_q_heads, num_kv_heads);
  check_seq_len("k", seq_len_k);
  if (seq_len_q > seq_len_k) {
    fail("q", "at most Sk = " + std::to_string(seq_len_k) + " query positions",
         std::to_string(seq_len_q));
  }
  expect_shape("out", "[B, Hq, Sq, D]", out, q.shape);
  expect_dtype("out", out, q.dtype);
  expect_contiguous_rows("q", q);
  expect_contiguous_rows("k", k);
  expect_contiguous_rows("v", v);
  expect_contiguous_rows("out", out);
  expect_writable("out", out);

  AttendProblem p{};
  p.batch = batch, p.num_q_heads = num_q_heads, p.num_kv_heads = num_kv_heads;
  p.group = num_kv_heads ? num_q_heads / num_kv_heads : 1;
  p.seq_len_q = seq_len_q, p.seq_len_k = seq_len_k, p.head_dim = dim;
  p.dtype = q.dtype, p.score_dtype = score_dtype_for(q.dtype);
  fill_attend_selection<3>(p, options, selection, scores.has_value(), 0);
  if (scores) {
    expect_shape("scores", "[B, Hkv, Sk]", *scores, {batch, num_kv_heads, seq_len_k});
    expect_dtype("scores", *scores, p.score_dtype);
    if (p.gate != Gate::kNone) {
      p.scores = scores->data;
      p.stride_scores_batch = scores->stride[0], p.stride_scores_head = scores->stride[1];
      p.stride_scores_position = scores->stride[2];
    }
  }
  p.lengths = check_lengths(context, lengths, batch, seq_len_k);
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = const_cast<void*>(out.data);
  p.stride_q_batch = q.stride[0], p.stride_q_head = q.stride[1], p.stride_q_position = q.stride[2];
  p.stride_k_batch = k.stride[0], p.stride_k_head = k.stride[1], p.stride_k_position = k.stride[2];
  p.stride_v_batch = v.stride[0], p.stride_v_head = v.stride[1], p.stride_v_position = v.stride[2];
  p.stride_out_batch = out.stride[0], p.stride_out_head = out.stride[1];
  p.stride_out_position = out.stride[2];
  if (lse) {
    expect_shape("lse", "[B, Hq, Sq]", *lse, {batch, num_q_heads, seq_len_q});
    expect_dtype("lse", *lse, p.score_dtype);
    expect_contiguous("lse", *lse);
    p.lse = const_cast<void*>(lse->data);
    p.stride_lse_batch = lse->stride[0], p.stride_lse_head = lse->stride[1];
    p.stride_lse_position = lse->stride[2];
  }
  return p;
}

AttendProblem make_attend_problem(Context const& context, ConstTensorView<3> const& q,
                                  ConstTensorView<3> const& k, ConstTensorView<3> const& v,
                                  std::optional<ConstTensorView<2>> const& scores,
                                  ConstPackedSelectionView const& selection,
                                  ConstTensorView<1> const& cu_seqlens_q,
                                  ConstTensorView<1> const& cu_seqlens_k,
                                  AttendOptions const& options, ConstTensorView<3> const& out,
                                  std::optional<ConstTensorView<2>> const& lse) {
  check_context(context);
  expect_float_dtype(context, "q", q.dtype);
  expect_data("q", q);
  expect_data("k", k);
  auto const [total_q, num_q_heads, dim] = q.shape;
  std::int64_t const total_k = k.shape[0], num_kv_heads = k.shape[1];
  expect_shape("k", "[total_k, Hkv, D]", k, {total_k, num_kv_heads, dim});
  expect_shape("v", "[total_k, Hkv, D]", v, {total_k, num_kv_heads, dim});
  expect_dtype("k", k, q.dtype);
  expect_dtype("v", v, q.dtype);
  check_heads(num_q_heads, num_kv_heads);
  check_seq_len("k", total_k);
  check_seq_len("q", total_q);
  expect_shape("out", "[total_q, Hq, D]", out, q.shape);
  expect_dtype("out", out, q.dtype);
  expect_contiguous_rows("q", q);
  expect_contiguous_rows("k", k);
  expect_contiguous_rows("v", v);
  expect_contiguous_rows("out", out);
  expect_writable("out", out);

  AttendProblem p{};
  p.cu_seqlens_q = check_cu_seqlens(context, "cu_seqlens_q", cu_seqlens_q, total_q);
  p.cu_seqlens_k = check_cu_seqlens(context, "cu_seqlens_k", cu_seqlens_k, total_k);
  if (cu_seqlens_q.shape != cu_seqlens_k.shape) {
    fail("cu_seqlens_q", "shape [N + 1] = " + describe(cu_seqlens_k.shape) + " as cu_seqlens_k",
         describe(cu_seqlens_q.shape));
  }
  p.batch = cu_seqlens_q.shape[0] - 1;
  for (std::int64_t b = 0; is_host(context) && b < p.batch; ++b) {
    std::int64_t const sq = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    std::int64_t const sk = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
    if (sq > sk) {
      fail("cu_seqlens_q",
           "at most as many queries as keys (" + std::to_string(sk) + ") in sequence " +
               std::to_string(b),
           std::to_string(sq));
    }
  }
  p.num_q_heads = num_q_heads, p.num_kv_heads = num_kv_heads;
  p.group = num_kv_heads ? num_q_heads / num_kv_heads : 1;
  p.seq_len_q = total_q, p.seq_len_k = total_k, p.head_dim = dim;
  p.dtype = q.dtype, p.score_dtype = score_dtype_for(q.dtype);
  fill_attend_selection<2>(p, options, selection, scores.has_value(), p.batch);
  if (scores) {
    expect_shape("scores", "[total_k, Hkv]", *scores, {total_k, num_kv_heads});
    expect_dtype("scores", *scores, p.score_dtype);
    if (p.gate != Gate::kNone) {
      p.scores = scores->data;
      p.stride_scores_head = scores->stride[1], p.stride_scores_position = scores->stride[0];
    }
  }
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = const_cast<void*>(out.data);
  p.stride_q_head = q.stride[1], p.stride_q_position = q.stride[0];
  p.stride_k_head = k.stride[1], p.stride_k_position = k.stride[0];
  p.stride_v_head = v.stride[1], p.stride_v_position = v.stride[0];
  p.stride_out_head = out.stride[1], p.stride_out_position = out.stride[0];
  if (lse) {
    expect_shape("lse", "[total_q, Hq]", *lse, {total_q, num_q_heads});
    expect_dtype("lse", *lse, p.score_dtype);
    expect_contiguous("lse", *lse);
    p.lse = const_cast<void*>(lse->data);
    p.stride_lse_head = lse->stride[1], p.stride_lse_position = lse->stride[0];
  }
  return p;
}

// --- attend_backward
// -------------------------------------------------------------------------------------------------

namespace {

template <std::size_t Rank>
struct GradientNames;
template <>
struct GradientNames<4> {
  static constexpr char const *kQ = "[B, Hq, Sq, D]", *kK = "[B, Hkv, Sk, D]";
  static constexpr char const* kScores = "[B, Hkv, Sk]";
};
template <>
struct GradientNames<3> {
  static constexpr char const *kQ = "[total_q, Hq, D]", *kK = "[total_k, Hkv, D]";
  static constexpr char const* kScores = "[total_k, Hkv]";
};

// What a backward has besides the forward's problem. `scores_shape` is that of dscores.
template <std::size_t Rank>
void fill_gradients(AttendBackwardProblem& p, bool has_last_candidate,
                    std::array<std::int64_t, Rank> const& q_shape,
                    std::array<std::int64_t, Rank> const& k_shape,
                    std::array<std::int64_t, Rank - 1> const& scores_shape,
                    ConstTensorView<Rank> const& dout, TensorView<Rank> const& dq,
                    TensorView<Rank> const& dk, TensorView<Rank> const& dv,
                    std::optional<TensorView<Rank - 1>> const& dscores) {
  using Names = GradientNames<Rank>;
  constexpr bool kPacked = Rank == 3;
  auto const check = [&](char const* name, char const* dims, ConstTensorView<Rank> const& t,
                         std::array<std::int64_t, Rank> const& shape) {
    expect_shape(name, dims, t, shape);
    expect_dtype(name, t, p.forward.dtype);
    expect_contiguous_rows(name, t);
  };
  check("dout", Names::kQ, dout, q_shape);
  check("dq", Names::kQ, dq, q_shape);
  check("dk", Names::kK, dk, k_shape);
  check("dv", Names::kK, dv, k_shape);
  expect_writable<Rank>("dq", dq);
  expect_writable<Rank>("dk", dk);
  expect_writable<Rank>("dv", dv);
  p.dout = dout.data, p.dq = dq.data, p.dk = dk.data, p.dv = dv.data;
  auto const set_strides = [](auto const& t, std::int64_t& batch, std::int64_t& head,
                              std::int64_t& position) {
    batch = kPacked ? 0 : t.stride[0];
    head = t.stride[1];
    position = t.stride[kPacked ? 0 : 2];
  };
  set_strides(dout, p.stride_dout_batch, p.stride_dout_head, p.stride_dout_position);
  set_strides(dq, p.stride_dq_batch, p.stride_dq_head, p.stride_dq_position);
  set_strides(dk, p.stride_dk_batch, p.stride_dk_head, p.stride_dk_position);
  set_strides(dv, p.stride_dv_batch, p.stride_dv_head, p.stride_dv_position);
  if (!dscores) return;
  expect_shape<Rank - 1>("dscores", Names::kScores, *dscores, scores_shape);
  expect_dtype<Rank - 1>("dscores", *dscores, p.forward.score_dtype);
  expect_contiguous<Rank - 1>("dscores", *dscores);
  if (p.forward.gate != Gate::kNone && !has_last_candidate) {
    fail("last_candidate", "the selection's, which dscores needs", "none");
  }
  p.dscores = dscores->data;
  set_strides(*dscores, p.stride_dscores_batch, p.stride_dscores_head, p.stride_dscores_position);
}

}  // namespace

AttendBackwardProblem make_attend_backward_problem(
    Context const& context, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
    ConstTensorView<4> const& v, std::optional<ConstTensorView<3>> const& scores,
    ConstSelectionView const& selection, std::optional<ConstTensorView<1>> const& lengths,
    AttendOptions const& options, ConstTensorView<4> const& out, ConstTensorView<3> const& lse,
    ConstTensorView<4> const& dout, TensorView<4> const& dq, TensorView<4> const& dk,
    TensorView<4> const& dv, std::optional<TensorView<3>> const& dscores) {
  AttendBackwardProblem p{};
  p.forward = make_attend_problem(context, q, k, v, scores, selection, lengths, options, out, lse);
  fill_gradients<4>(p, selection.last_candidate.has_value(), q.shape, k.shape,
                    {k.shape[0], k.shape[1], k.shape[2]}, dout, dq, dk, dv, dscores);
  return p;
}

AttendBackwardProblem make_attend_backward_problem(
    Context const& context, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
    ConstTensorView<3> const& v, std::optional<ConstTensorView<2>> const& scores,
    ConstPackedSelectionView const& selection, ConstTensorView<1> const& cu_seqlens_q,
    ConstTensorView<1> const& cu_seqlens_k, AttendOptions const& options,
    ConstTensorView<3> const& out, ConstTensorView<2> const& lse, ConstTensorView<3> const& dout,
    TensorView<3> const& dq, TensorView<3> const& dk, TensorView<3> const& dv,
    std::optional<TensorView<2>> const& dscores) {
  AttendBackwardProblem p{};
  p.forward = make_attend_problem(context, q, k, v, scores, selection, cu_seqlens_q, cu_seqlens_k,
                                  options, out, lse);
  fill_gradients<3>(p, selection.last_candidate.has_value(), q.shape, k.shape,
                    {k.shape[0], k.shape[1]}, dout, dq, dk, dv, dscores);
  return p;
}

// --- projection
// ------------------------------------------------------------------------------------------------------

namespace {
void check_projection_tensor(char const* name, ConstTensorView<2> const& t, DataType dtype,
                             std::array<std::int64_t, 2> const& shape) {
  expect_shape(name, "[R, n]", t, shape);
  expect_dtype(name, t, dtype);
}
void check_projection_context(Context const& context, char const* name, DataType dtype) {
  check_context(context);
  if (!is_host(context)) throw Unsupported("sparsek_projection: host memory only, got CUDA");
  if (dtype != DataType::kFloat32 && dtype != DataType::kFloat64) {
    fail(name, "dtype float32 or float64", name_of(dtype));
  }
}
}  // namespace

void check_projection(Context const& context, ConstTensorView<2> const& z, std::int64_t k,
                      TensorView<2> const& p) {
  check_projection_context(context, "z", z.dtype);
  if (k < 0) fail("k", "a number >= 0", std::to_string(k));
  expect_data("z", z);
  check_projection_tensor("p", p, z.dtype, z.shape);
  expect_contiguous<2>("p", p);
  for (std::int64_t r = 0; r < z.shape[0]; ++r) {
    for (std::int64_t j = 0; j < z.shape[1]; ++j) {
      std::int64_t const at = r * z.stride[0] + j * z.stride[1];
      double const value = z.dtype == DataType::kFloat64 ? static_cast<double const*>(z.data)[at]
                                                         : static_cast<float const*>(z.data)[at];
      if (!std::isfinite(value)) {
        fail("z", "finite values",
             std::to_string(value) + " at row " + std::to_string(r) + ", column " +
                 std::to_string(j));
      }
    }
  }
}

void check_projection_backward(Context const& context, ConstTensorView<2> const& p,
                               ConstTensorView<2> const& dp, TensorView<2> const& dz) {
  check_projection_context(context, "p", p.dtype);
  expect_data("p", p);
  check_projection_tensor("dp", dp, p.dtype, p.shape);
  check_projection_tensor("dz", dz, p.dtype, p.shape);
  expect_contiguous<2>("dz", dz);
}

}  // namespace sparsek
