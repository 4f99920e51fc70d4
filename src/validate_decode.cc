// The checker of stage 5, decode, and the layout of a state block.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "checks.hpp"
#include "sparsek/error.hpp"
#include "validate.hpp"

namespace sparsek {

// --- layout
// ----------------------------------------------------------------------------------------------------------

DecodeStateLayout decode_state_layout(DataType dtype, std::int64_t num_kv_heads,
                                      std::int64_t head_dim, SelectOptions const& options) {
  check_select_options(options);
  if (dtype == DataType::kInt32) fail("dtype", "a floating-point dtype", "int32");
  if (dtype == DataType::kFloat64) {
    throw Unsupported(
        "dtype: float64 is not served by decode; supported: float16, bfloat16, float32");
  }
  if (num_kv_heads < 0) fail("num_kv_heads", "a number >= 0", std::to_string(num_kv_heads));
  if (head_dim < 0) fail("head_dim", "a number >= 0", std::to_string(head_dim));

  DecodeStateLayout layout;
  layout.dtype = dtype, layout.num_kv_heads = num_kv_heads, layout.head_dim = head_dim;
  layout.num_selected = options.num_selected, layout.window = options.window;
  layout.chunk_size = options.chunk_size;
  layout.num_candidates = resolved_num_candidates(options);
  // Rows and candidates are counted in int32. Written without overflow: each option may be 2^60.
  auto const expect_rows = [](char const* what, std::int64_t n) {
    if (n > kMaxPositions) {
      fail("state", "at most " + std::to_string(kMaxPositions) + " " + what, std::to_string(n));
    }
  };
  expect_rows("candidates (num_candidates)", layout.num_candidates);
  expect_rows("selected rows (num_selected)", layout.num_selected);
  expect_rows("rows of the window", layout.window);
  expect_rows("rows of a chunk (chunk_size)", layout.chunk_size);
  layout.num_rows = layout.num_selected + layout.window + layout.chunk_size;
  expect_rows("rows (num_selected + window + chunk_size)", layout.num_rows);
  double const estimate = static_cast<double>(num_kv_heads) * static_cast<double>(layout.num_rows) *
                          (2.0 * static_cast<double>(size_of(dtype) * head_dim) + 32.0);
  if (estimate > 0x1p60) {
    fail("state", "a block of less than 2^60 bytes", std::to_string(estimate) + " bytes");
  }

  std::int64_t end = 0;
  auto const take = [&](std::int64_t bytes) {
    std::int64_t const offset = end;
    end += (bytes + kDecodeStateAlignment - 1) / kDecodeStateAlignment * kDecodeStateAlignment;
    return offset;
  };
  std::int64_t const rows_bytes =
      layout.num_rows * head_dim * static_cast<std::int64_t>(size_of(dtype));
  take(sizeof(DecodeHeadHeader));
  layout.candidates_offset = take(layout.num_candidates * sizeof(float));
  layout.positions_offset = take(layout.num_selected * sizeof(std::int32_t));
  layout.scores_offset = take(layout.num_rows * sizeof(float));
  layout.k_offset = take(rows_bytes);
  layout.v_offset = take(rows_bytes);
  layout.head_bytes = end;
  layout.block_bytes = num_kv_heads * end;
  return layout;
}

// --- decode
// ----------------------------------------------------------------------------------------------------------

namespace {

template <std::size_t Rank>
struct Names;
template <>
struct Names<4> {
  static constexpr char const *kQ = "[N, Hq, S, D]", *kK = "[N, Hkv, S, D]";
  static constexpr char const *kScores = "[N, Hkv, S]", *kLse = "[N, Hq, S]";
};
template <>
struct Names<3> {
  static constexpr char const *kQ = "[total, Hq, D]", *kK = "[total, Hkv, D]";
  static constexpr char const *kScores = "[total, Hkv]", *kLse = "[total, Hq]";
};

// Packed tensors are [total, heads, ...], dense ones [batch, heads, positions, ...].
template <std::size_t Rank>
constexpr std::size_t kPosition = Rank == 4 ? 2 : 0;

template <typename Tensor>
void set_strides(Tensor const& t, bool packed, std::int64_t& batch, std::int64_t& head,
                 std::int64_t& position) {
  batch = packed ? 0 : t.stride[0];
  head = t.stride[1];
  position = t.stride[packed ? 0 : 2];
}

// k, v and scores, whose shapes say what the state's blocks are.
template <std::size_t Rank>
DecodeProblem make_tokens(Context const& context, ConstTensorView<Rank> const& k,
                          ConstTensorView<Rank> const& v, ConstTensorView<Rank - 1> const& scores,
                          SelectOptions const& options) {
  check_context(context);
  expect_float_dtype(context, "k", k.dtype);
  expect_data("k", k);
  expect_shape("v", Names<Rank>::kK, v, k.shape);
  expect_dtype("v", v, k.dtype);
  expect_contiguous_rows("k", k);
  expect_contiguous_rows("v", v);
  DecodeProblem p{};
  p.seq_len = k.shape[kPosition<Rank>];
  p.num_kv_heads = k.shape[1], p.head_dim = k.shape[Rank - 1], p.dtype = k.dtype;
  check_seq_len("k", p.seq_len);
  p.layout = decode_state_layout(k.dtype, p.num_kv_heads, p.head_dim, options);
  std::array<std::int64_t, Rank - 1> score_shape;
  std::copy_n(k.shape.begin(), Rank - 1, score_shape.begin());
  expect_shape("scores", Names<Rank>::kScores, scores, score_shape);
  expect_dtype("scores", scores, DataType::kFloat32);
  constexpr bool kPacked = Rank == 3;
  p.k = k.data, p.v = v.data, p.scores = static_cast<float const*>(scores.data);
  set_strides(k, kPacked, p.stride_k_batch, p.stride_k_head, p.stride_k_position);
  set_strides(v, kPacked, p.stride_v_batch, p.stride_v_head, p.stride_v_position);
  set_strides(scores, kPacked, p.stride_scores_batch, p.stride_scores_head,
              p.stride_scores_position);
  p.num_q_heads = p.num_kv_heads, p.group = 1;
  return p;
}

template <std::size_t Rank>
void add_queries(DecodeProblem& p, ConstTensorView<Rank> const& q, ConstTensorView<Rank> const& k,
                 DecodeOptions const& options, ConstTensorView<Rank> const& out,
                 std::optional<TensorView<Rank - 1>> const& lse) {
  p.num_q_heads = q.shape[1];
  check_heads(p.num_q_heads, p.num_kv_heads);
  p.group = p.num_kv_heads ? p.num_q_heads / p.num_kv_heads : 1;
  std::array<std::int64_t, Rank> q_shape = k.shape;
  q_shape[1] = p.num_q_heads;
  expect_shape("q", Names<Rank>::kQ, q, q_shape);
  expect_shape("out", Names<Rank>::kQ, out, q_shape);
  expect_dtype("q", q, p.dtype);
  expect_dtype("out", out, p.dtype);
  expect_contiguous_rows("q", q);
  expect_contiguous_rows("out", out);
  expect_writable("out", out);
  constexpr bool kPacked = Rank == 3;
  p.q = q.data, p.out = const_cast<void*>(out.data);
  set_strides(q, kPacked, p.stride_q_batch, p.stride_q_head, p.stride_q_position);
  set_strides(out, kPacked, p.stride_out_batch, p.stride_out_head, p.stride_out_position);
  if (lse) {
    std::array<std::int64_t, Rank - 1> lse_shape;
    std::copy_n(q_shape.begin(), Rank - 1, lse_shape.begin());
    expect_shape<Rank - 1>("lse", Names<Rank>::kLse, *lse, lse_shape);
    expect_dtype<Rank - 1>("lse", *lse, DataType::kFloat32);
    expect_contiguous<Rank - 1>("lse", *lse);
    p.lse = static_cast<float*>(lse->data);
    set_strides(*lse, kPacked, p.stride_lse_batch, p.stride_lse_head, p.stride_lse_position);
  }
  p.gate = options.gate;
  p.sm_scale = options.sm_scale.value_or(
      1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(1, p.head_dim))));
  if (!std::isfinite(p.sm_scale)) fail("sm_scale", "a finite number", std::to_string(p.sm_scale));
}

std::int64_t num_tokens(DecodeProblem const& p, std::int64_t b) {
  if (p.cu_seqlens) return p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  return p.lengths ? p.lengths[b] : p.seq_len;
}

void check_blocks(DecodeProblem const& p) {
  std::vector<std::int32_t> blocks(p.block_index, p.block_index + p.batch);
  std::sort(blocks.begin(), blocks.end());
  if (!blocks.empty() && (blocks.front() < 0 || blocks.back() >= p.num_blocks)) {
    fail("block_index", "values from 0 to " + std::to_string(p.num_blocks - 1),
         std::to_string(blocks.front() < 0 ? blocks.front() : blocks.back()));
  }
  auto const twice = std::adjacent_find(blocks.begin(), blocks.end());
  if (twice != blocks.end()) {
    fail("block_index", "a block of its own for each sequence", std::to_string(*twice) + " twice");
  }
}

// A continuing block that another configuration or nobody has filled must not lead out of bounds.
void check_headers(DecodeProblem const& p) {
  for (std::int64_t b = 0; b < p.batch; ++b) {
    std::int64_t before = 0;
    auto const* const block =
        static_cast<std::byte const*>(p.state) + p.block_index[b] * p.stride_block;
    for (std::int64_t h = 0; (!p.continues || p.continues[b]) && h < p.num_kv_heads; ++h) {
      DecodeHeadHeader header;
      std::memcpy(&header, block + h * p.layout.head_bytes, sizeof(header));
      if (h == 0) before = header.num_tokens;
      bool const candidates_fit =
          header.num_tokens == 0 ||
          (header.num_candidates >= 0 && header.num_candidates <= p.layout.num_candidates);
      if (before < 0 || header.num_tokens != before || !candidates_fit) {
        fail("state",
             "blocks of zeros or that were filled with these options, in sequence " +
                 std::to_string(b),
             std::to_string(header.num_tokens) + " tokens and " +
                 std::to_string(header.num_candidates) + " candidates in head " +
                 std::to_string(h));
      }
    }
    if (before + num_tokens(p, b) > kMaxPositions) {
      fail("k",
           "at most " + std::to_string(kMaxPositions) + " positions in sequence " +
               std::to_string(b),
           std::to_string(before) + " and " + std::to_string(num_tokens(p, b)) + " more");
    }
  }
}

void check_finite(DecodeProblem const& p) {
  for (std::int64_t b = 0; b < p.batch; ++b) {
    std::int64_t const first = p.cu_seqlens ? p.cu_seqlens[b] : 0;
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) {
      float const* const row = p.scores + b * p.stride_scores_batch + h * p.stride_scores_head +
                               first * p.stride_scores_position;
      std::int64_t const count = num_tokens(p, b);
      if (p.stride_scores_position == 1 && is_finite_row(row, count)) continue;
      for (std::int64_t j = 0; j < count; ++j) {
        float const u = row[j * p.stride_scores_position];
        if (!std::isfinite(u)) {
          fail("scores", "finite values",
               std::to_string(u) + " at sequence " + std::to_string(b) + ", head " +
                   std::to_string(h) + ", token " + std::to_string(j));
        }
      }
    }
  }
}

// The pool. Last: it reads values, which need everything before to be right.
void add_state(DecodeProblem& p, Context const& context, DecodeStateView const& state,
               std::int64_t batch) {
  p.batch = batch;
  expect_shape<1>("block_index", "[N]", state.block_index, {batch});
  expect_dtype("block_index", state.block_index, DataType::kInt32);
  expect_contiguous("block_index", state.block_index);
  p.block_index = static_cast<std::int32_t const*>(state.block_index.data);
  if (state.continues) {
    expect_shape<1>("continues", "[N]", *state.continues, {batch});
    expect_dtype("continues", *state.continues, DataType::kInt32);
    expect_contiguous("continues", *state.continues);
    p.continues = static_cast<std::int32_t const*>(state.continues->data);
  }
  if (state.num_blocks < 0)
    fail("state", "a number of blocks >= 0", std::to_string(state.num_blocks));
  bool const aligned = reinterpret_cast<std::uintptr_t>(state.data) % kDecodeStateAlignment == 0 &&
                       state.stride_block % kDecodeStateAlignment == 0;
  if (state.num_blocks > 0 && !aligned) {
    fail("state",
         "an address and a stride that are multiples of " + std::to_string(kDecodeStateAlignment),
         "others");
  }
  if (state.num_blocks > 0 && (!state.data || state.stride_block < p.layout.block_bytes)) {
    fail("state",
         "blocks of " + std::to_string(p.layout.block_bytes) +
             " bytes, as dtype, shape and options need",
         state.data ? std::to_string(state.stride_block) : "null");
  }
  p.state = state.data, p.num_blocks = state.num_blocks, p.stride_block = state.stride_block;
  if (!is_host(context)) return;
  check_blocks(p);
  check_headers(p);
  check_finite(p);
}

void add_packing(DecodeProblem& p, Context const& context, ConstTensorView<1> const& cu_seqlens) {
  p.cu_seqlens = check_cu_seqlens(context, "cu_seqlens", cu_seqlens, p.seq_len);
}

}  // namespace

DecodeProblem make_decode_problem(Context const& context, ConstTensorView<4> const& q,
                                  ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                                  ConstTensorView<3> const& scores,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  DecodeOptions const& options, DecodeStateView const& state,
                                  TensorView<4> const& out,
                                  std::optional<TensorView<3>> const& lse) {
  DecodeProblem p = make_tokens(context, k, v, scores, options.selection);
  add_queries<4>(p, q, k, options, out, lse);
  p.lengths = check_lengths(context, lengths, k.shape[0], p.seq_len);
  add_state(p, context, state, k.shape[0]);
  return p;
}

DecodeProblem make_decode_problem(Context const& context, ConstTensorView<3> const& q,
                                  ConstTensorView<3> const& k, ConstTensorView<3> const& v,
                                  ConstTensorView<2> const& scores,
                                  ConstTensorView<1> const& cu_seqlens,
                                  DecodeOptions const& options, DecodeStateView const& state,
                                  TensorView<3> const& out,
                                  std::optional<TensorView<2>> const& lse) {
  DecodeProblem p = make_tokens(context, k, v, scores, options.selection);
  add_queries<3>(p, q, k, options, out, lse);
  add_packing(p, context, cu_seqlens);
  add_state(p, context, state, cu_seqlens.shape[0] - 1);
  return p;
}

DecodeProblem make_append_problem(Context const& context, ConstTensorView<4> const& k,
                                  ConstTensorView<4> const& v, ConstTensorView<3> const& scores,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  SelectOptions const& options, DecodeStateView const& state) {
  DecodeProblem p = make_tokens(context, k, v, scores, options);
  p.lengths = check_lengths(context, lengths, k.shape[0], p.seq_len);
  add_state(p, context, state, k.shape[0]);
  return p;
}

DecodeProblem make_append_problem(Context const& context, ConstTensorView<3> const& k,
                                  ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
                                  ConstTensorView<1> const& cu_seqlens,
                                  SelectOptions const& options, DecodeStateView const& state) {
  DecodeProblem p = make_tokens(context, k, v, scores, options);
  add_packing(p, context, cu_seqlens);
  add_state(p, context, state, cu_seqlens.shape[0] - 1);
  return p;
}

}  // namespace sparsek
