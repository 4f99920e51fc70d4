// decode through the C++ interface: the rows of the one-shot reference, on every instruction set, and
// refusals that leave the state as it was.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "case_data.hpp"
#include "cpu/isa.hpp"
#include "scoped_isa.hpp"

namespace sparsek::testing {
namespace {

constexpr std::int64_t kBatch = 2, kHeads = 6, kKvHeads = 2, kDim = 40;

// Whole sequences, and what the reference makes of them.
struct Sequences {
  Sequences(std::int64_t seq_len, DataType dtype, DecodeOptions const& options)
      : seq_len(seq_len),
        dtype(dtype),
        q(dtype, {kBatch, kHeads, seq_len, kDim}),
        k(dtype, {kBatch, kKvHeads, seq_len, kDim}),
        v(dtype, {kBatch, kKvHeads, seq_len, kDim}),
        scores(DataType::kFloat32, {kBatch, kKvHeads, seq_len}),
        expected(DataType::kFloat64, {kBatch, kHeads, seq_len, kDim}) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    auto const fill = [&](auto& tensor) {
      tensor.for_each([&](auto const& i) { tensor.set(i, normal(random)); });
    };
    fill(q), fill(k), fill(v), fill(scores);

    Context const reference{.backend = Backend::kReference};
    auto const scores64 = scores.as(DataType::kFloat64);
    std::int64_t const chunks =
        (seq_len + options.selection.chunk_size - 1) / options.selection.chunk_size;
    Tensor<3> expiry(DataType::kInt32, {kBatch, kKvHeads, seq_len});
    Tensor<3> threshold(DataType::kFloat64, {kBatch, kKvHeads, chunks});
    select(reference, scores64.view(), std::nullopt, options.selection,
           {expiry.view(), threshold.view()});
    auto const q64 = q.as(DataType::kFloat64), k64 = k.as(DataType::kFloat64),
               v64 = v.as(DataType::kFloat64);
    ConstSelectionView selection(std::as_const(expiry).view());
    selection.threshold = std::as_const(threshold).view();
    attend(reference, q64.view(), k64.view(), v64.view(), scores64.view(), selection, std::nullopt,
           {.gate = options.gate, .sm_scale = options.sm_scale, .selection = options.selection},
           expected.view(), std::nullopt);
  }

  // Tokens begin ... end - 1 of a tensor, a view into it.
  template <std::size_t Rank, typename Tensor>
  static ConstTensorView<Rank> tokens(Tensor const& t, std::int64_t begin, std::int64_t end) {
    ConstTensorView<Rank> view = t.view();
    view.data = static_cast<std::byte const*>(view.data) +
                begin * view.stride[2] * static_cast<std::int64_t>(size_of(view.dtype));
    view.shape[2] = end - begin;
    return view;
  }

  std::int64_t seq_len;
  DataType dtype;
  Tensor<4> q, k, v;
  Tensor<3> scores;
  Tensor<4> expected;
};

// Memory of blocks that nobody has written to.
struct Pool {
  Pool(DecodeStateLayout const& layout, std::int64_t num_blocks)
      : bytes(layout.block_bytes * num_blocks),
        data(static_cast<std::byte*>(
            ::operator new(bytes, std::align_val_t{kDecodeStateAlignment}))) {
    std::memset(data, 0xFF, bytes);  // NaN, and -1
  }
  ~Pool() { ::operator delete(data, std::align_val_t{kDecodeStateAlignment}); }
  Pool(Pool const&) = delete;

  std::vector<std::byte> copy() const { return {data, data + bytes}; }

  std::int64_t bytes;
  std::byte* data;
};

ConstTensorView<1> view_of(std::vector<std::int32_t> const& v) {
  return {v.data(), DataType::kInt32, {static_cast<std::int64_t>(v.size())}};
}

// Steps of 1, 2, ... tokens through the blocks 2 and 0 of a pool, the first calls only appended.
void expect_rows_of_one_shot(DataType dtype, DecodeOptions const& options) {
  Sequences const s(180, dtype, options);
  DecodeStateLayout const layout = decode_state_layout(dtype, kKvHeads, kDim, options.selection);
  Pool pool(layout, 3);
  std::vector<std::int32_t> const blocks{2, 0}, fresh{0, 0};
  std::int64_t step = 0;
  for (std::int64_t begin = 0; begin < s.seq_len; ++step) {
    std::int64_t const end = std::min(begin + 1 + step % 23, s.seq_len);
    DecodeStateView state{pool.data, 3, layout.block_bytes, view_of(blocks)};
    if (begin == 0) state.continues = view_of(fresh);
    auto const k = Sequences::tokens<4>(s.k, begin, end);
    auto const v = Sequences::tokens<4>(s.v, begin, end);
    auto const scores = Sequences::tokens<3>(s.scores, begin, end);
    if (step % 5 == 4) {
      decode_append(Context{}, k, v, scores, std::nullopt, options.selection, state);
    } else {
      Tensor<4> out(dtype, {kBatch, kHeads, end - begin, kDim});
      decode(Context{}, Sequences::tokens<4>(s.q, begin, end), k, v, scores, std::nullopt, options,
             state, out.view(), std::nullopt);
      out.for_each([&](auto const& i) {
        double const expected = s.expected.get({i[0], i[1], begin + i[2], i[3]});
        ASSERT_NEAR(out.get(i), expected, output_tolerance(dtype, expected))
            << "tokens from " << begin << " at " << join(i);
      });
    }
    begin = end;
  }
}

class Decode : public ::testing::TestWithParam<cpu::Isa> {};

TEST_P(Decode, EqualsOneShot) {
  if (GetParam() > cpu::best_isa()) GTEST_SKIP() << "not an instruction set of this machine";
  ScopedIsa const isa(cpu::name_of(GetParam()));
  for (DataType const dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    for (Gate const gate : {Gate::kNone, Gate::kValue, Gate::kSoftmax}) {
      for (std::int64_t const chunk_size : {1, 16, 128}) {
        SCOPED_TRACE(std::string(name_of(dtype)) + ", chunk_size " + std::to_string(chunk_size));
        DecodeOptions options{.gate = gate};
        options.selection = {.num_selected = 24, .window = 11, .chunk_size = chunk_size};
        expect_rows_of_one_shot(dtype, options);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Decode,
                         ::testing::Values(cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512,
                                           cpu::Isa::kAvx512Bf16),
                         [](auto const& info) { return std::string(cpu::name_of(info.param)); });

TEST(DecodeLayout, PiecesDoNotOverlapAndAreAligned) {
  for (DataType const dtype : {DataType::kFloat32, DataType::kBFloat16}) {
    for (std::int64_t const k : {0, 1, 256}) {
      DecodeStateLayout const l = decode_state_layout(
          dtype, 3, 80, {.num_selected = k, .window = 5, .chunk_size = 7, .num_candidates = 2 * k});
      EXPECT_EQ(l.num_rows, k + 12);
      std::int64_t const row_bytes = 80 * static_cast<std::int64_t>(size_of(dtype));
      EXPECT_GE(l.candidates_offset, static_cast<std::int64_t>(sizeof(DecodeHeadHeader)));
      EXPECT_GE(l.positions_offset, l.candidates_offset + 2 * k * 4);
      EXPECT_GE(l.scores_offset, l.positions_offset + k * 4);
      EXPECT_GE(l.k_offset, l.scores_offset + l.num_rows * 4);
      EXPECT_GE(l.v_offset, l.k_offset + l.num_rows * row_bytes);
      EXPECT_GE(l.head_bytes, l.v_offset + l.num_rows * row_bytes);
      EXPECT_EQ(l.block_bytes, 3 * l.head_bytes);
      for (std::int64_t const offset : {l.candidates_offset, l.positions_offset, l.scores_offset,
                                        l.k_offset, l.v_offset, l.head_bytes}) {
        EXPECT_EQ(offset % kDecodeStateAlignment, 0);
      }
    }
  }
}

TEST(DecodeErrors, NameTheArgumentAndLeaveTheState) {
  DecodeOptions options;
  options.selection = {.num_selected = 4, .window = 2, .chunk_size = 8};
  Sequences s(12, DataType::kFloat32, options);
  DecodeStateLayout const layout =
      decode_state_layout(DataType::kFloat32, kKvHeads, kDim, options.selection);
  Pool pool(layout, 2);
  std::memset(pool.data, 0, pool.bytes);
  std::vector<std::int32_t> blocks{1, 0};
  DecodeStateView const good{pool.data, 2, layout.block_bytes, view_of(blocks)};
  auto const append = [&](Context const& context, DecodeStateView const& state) {
    decode_append(context, s.k.view(), s.v.view(), s.scores.view(), std::nullopt, options.selection,
                  state);
  };
  append(Context{}, good);
  auto const before = pool.copy();
  auto const expect_refusal = [&](std::string const& name, auto const& call) {
    try {
      call();
      ADD_FAILURE() << "no error that names " << name;
    } catch (Error const& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
    EXPECT_EQ(pool.copy(), before);
  };
  auto const expect_state_refused = [&](std::string const& name, auto const& change) {
    DecodeStateView state = good;
    change(state);
    expect_refusal(name, [&] { append(Context{}, state); });
  };
  expect_state_refused("state", [](auto& state) { state.data = nullptr; });
  expect_state_refused("state", [](auto& state) { state.stride_block -= kDecodeStateAlignment; });
  expect_state_refused("state", [](auto& state) { state.stride_block += 4; });
  expect_state_refused("block_index", [](auto& state) { state.num_blocks = 1; });
  std::vector<std::int32_t> const twice{1, 1};
  expect_state_refused("block_index", [&](auto& state) { state.block_index = view_of(twice); });
  expect_refusal("reference", [&] { append({.backend = Backend::kReference}, good); });
  expect_refusal("CUDA", [&] { append({.device = {DeviceType::kCuda, 0}}, good); });
  s.scores.set({1, 1, 11}, std::numeric_limits<double>::infinity());
  expect_refusal("scores", [&] { append(Context{}, good); });
  EXPECT_THROW(decode_state_layout(DataType::kFloat64, 1, 8, {}), Unsupported);
  EXPECT_THROW(decode_state_layout(DataType::kFloat32, 1, 8, {.num_selected = 1LL << 40}),
               InvalidArgument);
}

}  // namespace
}  // namespace sparsek::testing
