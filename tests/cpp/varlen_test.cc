// Packed sequences equal one call per sequence, bit for bit.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "case_data.hpp"

namespace sparsek::testing {
namespace {

struct Packed {
  std::vector<std::int32_t> queries, keys;  // per sequence
};

std::vector<std::int32_t> cumulative(std::vector<std::int32_t> const& sizes) {
  std::vector<std::int32_t> sums{0};
  for (std::int32_t const n : sizes) sums.push_back(sums.back() + n);
  return sums;
}

ConstTensorView<1> view_of(std::vector<std::int32_t> const& v) {
  return {v.data(), DataType::kInt32, {static_cast<std::int64_t>(v.size())}};
}

void expect_equals_single_calls(Packed const& lengths, Gate gate, std::int64_t chunk_size,
                                DataType dtype) {
  constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDim = 40;
  auto const cu_q = cumulative(lengths.queries), cu_k = cumulative(lengths.keys);
  std::int64_t const total_q = cu_q.back(), total_k = cu_k.back();
  auto const sequences = static_cast<std::int64_t>(lengths.keys.size());
  Tensor<3> q(dtype, {total_q, kHeads, kDim}), out(dtype, {total_q, kHeads, kDim});
  Tensor<3> k(dtype, {total_k, kKvHeads, kDim}), v(dtype, {total_k, kKvHeads, kDim});
  Tensor<2> scores(DataType::kFloat32, {total_k, kKvHeads}),
      lse(DataType::kFloat32, {total_q, kHeads});
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (auto* t : {&q, &k, &v}) t->for_each([&](auto const& i) { t->set(i, normal(random)); });
  scores.for_each([&](auto const& i) { scores.set(i, normal(random)); });

  AttendOptions options;
  options.gate = gate;
  options.selection = {.num_selected = 12, .window = 9, .chunk_size = chunk_size};
  std::int64_t const columns = total_k / chunk_size + sequences;
  Tensor<2> expiry(DataType::kInt32, {kKvHeads, total_k});
  Tensor<2> threshold(DataType::kFloat32, {kKvHeads, columns});
  Tensor<2> last_candidate(DataType::kInt32, {kKvHeads, columns});
  PackedSelectionView const selection{expiry.view(), threshold.view(), last_candidate.view()};
  select_varlen(Context{}, scores.view(), view_of(cu_k), options.selection, selection);
  attend_varlen(Context{}, q.view(), k.view(), v.view(), scores.view(), selection, view_of(cu_q),
                view_of(cu_k), options, out.view(), lse.view());

  for (std::int64_t b = 0; b < sequences; ++b) {
    SCOPED_TRACE("sequence " + std::to_string(b));
    std::int64_t const sq = lengths.queries[b], sk = lengths.keys[b];
    Case c{"one", 1,        kHeads, kKvHeads, sq, sk, kDim, options.selection,
           gate,  "normal", "none", "bshd"};
    CaseData data(c, dtype);
    data.q.for_each([&](auto const& i) { data.q.set(i, q.get({cu_q[b] + i[2], i[1], i[3]})); });
    data.k.for_each([&](auto const& i) {
      data.k.set(i, k.get({cu_k[b] + i[2], i[1], i[3]}));
      data.v.set(i, v.get({cu_k[b] + i[2], i[1], i[3]}));
    });
    data.scores.for_each(
        [&](auto const& i) { data.scores.set(i, scores.get({cu_k[b] + i[2], i[1]})); });
    SelectionTensors single(c, DataType::kFloat32);
    Tensor<4> single_out = make_output(c, dtype);
    Tensor<3> single_lse = make_lse(c, DataType::kFloat32);
    select(Context{}, data.scores.view(), std::nullopt, options.selection, single.view());
    attend(Context{}, data.q.view(), data.k.view(), data.v.view(), data.scores.view(),
           single.view(), std::nullopt, options, single_out.view(), single_lse.view());
    single.expiry.for_each([&](auto const& i) {
      ASSERT_EQ(expiry.get({i[1], cu_k[b] + i[2]}), single.expiry.get(i));
    });
    single.threshold.for_each([&](auto const& i) {
      std::int64_t const column = cu_k[b] / chunk_size + b + i[2];
      ASSERT_EQ(threshold.get({i[1], column}), single.threshold.get(i));
      ASSERT_EQ(last_candidate.get({i[1], column}), single.last_candidate.get(i));
    });
    single_out.for_each([&](auto const& i) {
      ASSERT_EQ(out.get({cu_q[b] + i[2], i[1], i[3]}), single_out.get(i)) << join(i);
    });
    single_lse.for_each(
        [&](auto const& i) { ASSERT_EQ(lse.get({cu_q[b] + i[2], i[1]}), single_lse.get(i)); });
  }
}

TEST(Varlen, EqualsSingleCalls) {
  Packed const lengths{.queries = {1, 0, 200, 3, 16, 129, 0}, .keys = {1, 0, 200, 150, 16, 300, 5}};
  for (std::int64_t const chunk_size : {1, 16, 128}) {
    for (Gate const gate : {Gate::kNone, Gate::kValue, Gate::kSoftmax}) {
      expect_equals_single_calls(lengths, gate, chunk_size, DataType::kFloat32);
    }
  }
  expect_equals_single_calls(lengths, Gate::kSoftmax, 16, DataType::kBFloat16);
  expect_equals_single_calls(lengths, Gate::kSoftmax, 16, DataType::kFloat16);
}

TEST(Varlen, NothingToDo) {
  expect_equals_single_calls({.queries = {}, .keys = {}}, Gate::kSoftmax, 16, DataType::kFloat32);
  expect_equals_single_calls({.queries = {0, 0}, .keys = {0, 4}}, Gate::kSoftmax, 16,
                             DataType::kFloat32);
}

}  // namespace
}  // namespace sparsek::testing
