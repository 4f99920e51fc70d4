// select on the CPU against the fp64 reference: expiry and last_candidate bit for bit, thresholds
// within two units in the last place of the scores around them.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "case_data.hpp"

namespace sparsek::testing {
namespace {

Context context_of(Backend backend, int num_threads = 2) {
  Context context;
  context.backend = backend;
  context.num_threads = num_threads;
  return context;
}

double ulp(double x) {
  auto const f = static_cast<float>(std::fabs(x));
  return std::nextafterf(f, INFINITY) - f;
}

// A threshold lies at most 1 below the scores that it is computed from.
void expect_thresholds(Case const& c, CaseData const& data, Tensor<3> const& ours,
                       Tensor<3> const& reference) {
  reference.for_each([&](auto const& i) {
    if (i[2] * c.select.chunk_size >= data.length(i[0])) return;  // never read
    double const expected = reference.get(i), got = ours.get(i);
    if (got == expected) return;
    EXPECT_LE(std::fabs(got - expected), 2.0 * std::max(ulp(expected), ulp(expected + 1.0)))
        << "threshold[" << i[0] << ", " << i[1] << ", " << i[2] << "] = " << got << ", reference "
        << expected;
    if (i[2] > 0) {
      EXPECT_GE(got, ours.get({i[0], i[1], i[2] - 1}));
    }
  });
}

void expect_selects_like_reference(Case const& c, CaseData const& data) {
  SelectionTensors ours(c, DataType::kFloat32), reference(c, DataType::kFloat32);
  select(context_of(Backend::kCpu), data.scores.view(), data.lengths_view(), c.select, ours.view());
  select(context_of(Backend::kReference), data.scores.view(), data.lengths_view(), c.select,
         reference.view());
  EXPECT_TRUE(ours.expiry.memory() == reference.expiry.memory());
  EXPECT_TRUE(ours.last_candidate.memory() == reference.last_candidate.memory());
  expect_thresholds(c, data, ours.threshold, reference.threshold);
}

class SelectCase : public ::testing::TestWithParam<Case> {};

TEST_P(SelectCase, MatchesReference) {
  Case const& c = GetParam();
  CaseData const data(c, DataType::kFloat32);
  expect_selects_like_reference(c, data);
}

TEST_P(SelectCase, SameBitsWhateverTheThreads) {
  Case const& c = GetParam();
  CaseData const data(c, DataType::kFloat32);
  SelectionTensors one(c, DataType::kFloat32), five(c, DataType::kFloat32);
  select(context_of(Backend::kCpu, 1), data.scores.view(), data.lengths_view(), c.select,
         one.view());
  select(context_of(Backend::kCpu, 5), data.scores.view(), data.lengths_view(), c.select,
         five.view());
  EXPECT_TRUE(one.expiry.memory() == five.expiry.memory());
  EXPECT_TRUE(one.threshold.memory() == five.threshold.memory());
  EXPECT_TRUE(one.last_candidate.memory() == five.last_candidate.memory());
}

INSTANTIATE_TEST_SUITE_P(Table, SelectCase, ::testing::ValuesIn(case_table()),
                         [](auto const& info) { return info.param.name; });

// Small random problems: every relation of k, M, w, C and S, scores from few values with gaps of
// exactly 0, 1/4, 1/2 and 1.
TEST(Select, MatchesReferenceOnRandomSmallProblems) {
  std::mt19937 random(3);
  auto const below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  for (int trial = 0; trial < 3000 && !HasFailure(); ++trial) {
    Case c = case_named("one_token");
    c.seq_len_k = c.seq_len_q = 1 + below(60);
    c.batch = 2;
    c.select.num_selected = below(12);
    c.select.window = below(20);
    c.select.chunk_size = 1 + below(20);
    if (below(2)) c.select.num_candidates = c.select.num_selected + below(30);
    CaseData data(c, DataType::kFloat32);
    if (below(2)) data.lengths = {static_cast<std::int32_t>(below(c.seq_len_k + 1)), 1};
    double const unit = std::array{0.25, 0.5, 1.0, 1e-3, 3e9}[below(5)];
    data.scores.for_each([&](auto const& i) { data.scores.set(i, unit * (below(9) - 4)); });
    SCOPED_TRACE(
        "S=" + std::to_string(c.seq_len_k) + " k=" + std::to_string(c.select.num_selected) +
        " w=" + std::to_string(c.select.window) + " C=" + std::to_string(c.select.chunk_size) +
        " M=" + std::to_string(c.select.num_candidates.value_or(-1)) +
        " unit=" + std::to_string(unit));
    expect_selects_like_reference(c, data);
  }
}

// Scores that climb from -1e30 to 1e30 and back: sums over the pool must not cancel.
TEST(Select, ThresholdSurvivesScoresOfAnySize) {
  Case c = case_named("c1_value");
  CaseData data(c, DataType::kFloat32);
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  data.scores.for_each([&](auto const& i) {
    double const scale = i[2] < 100 ? -1e30 : i[2] < 300 ? 1.0 : i[2] < 500 ? 1e6 : 1e30;
    data.scores.set(
        i, i[2] < 100 || i[2] >= 300 ? scale * (1.0 + 1e-6 * normal(random)) : normal(random));
  });
  for (std::int64_t const candidates : {64, 256, 513}) {
    c.select.num_candidates = candidates;
    expect_selects_like_reference(c, data);
  }
}

TEST(Select, LastCandidateMayBeLeftOut) {
  Case const& c = case_named("c16_softmax");
  CaseData const data(c, DataType::kFloat32);
  SelectionTensors with(c, DataType::kFloat32), without(c, DataType::kFloat32);
  select(context_of(Backend::kCpu), data.scores.view(), std::nullopt, c.select, with.view());
  SelectionView view = without.view();
  view.last_candidate.reset();
  select(context_of(Backend::kCpu), data.scores.view(), std::nullopt, c.select, view);
  EXPECT_TRUE(with.expiry.memory() == without.expiry.memory());
  EXPECT_TRUE(with.threshold.memory() == without.threshold.memory());
}

}  // namespace
}  // namespace sparsek::testing
