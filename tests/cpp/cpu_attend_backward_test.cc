// attend_backward on the CPU against the fp64 reference, over the case table, every dtype and every
// instruction set of the machine; and what the table has no row for.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "case_data.hpp"
#include "scoped_isa.hpp"

namespace sparsek::testing {
namespace {

constexpr DataType kDtypes[] = {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16};

Context cpu_context(int num_threads = 2) {
  Context context;
  context.backend = Backend::kCpu;
  context.num_threads = num_threads;
  return context;
}

struct Gradients {
  Tensor<4> dq, dk, dv;
  Tensor<3> dscores;

  bool same_bits(Gradients const& other) const {
    return dq.memory() == other.dq.memory() && dk.memory() == other.dk.memory() &&
           dv.memory() == other.dv.memory() && dscores.memory() == other.dscores.memory();
  }
};

// A forward on the CPU and an upstream gradient, NaN where no query exists.
struct Problem {
  Problem(Case const& row, DataType dtype)
      : c(row),
        data(c, dtype),
        selection(c, DataType::kFloat32),
        out(make_output(c, dtype)),
        dout(make_output(c, dtype)),
        lse(make_lse(c, DataType::kFloat32)) {
    std::mt19937 random(17);
    std::normal_distribution<double> normal;
    std::int64_t const first = c.seq_len_k - c.seq_len_q;
    dout.for_each([&](auto const& i) {
      if (first + i[2] < data.length(i[0])) dout.set(i, normal(random));
    });
    select(cpu_context(), data.scores.view(), data.lengths_view(), c.select, selection.view());
    attend(cpu_context(), data.q.view(), data.k.view(), data.v.view(), data.scores.view(),
           selection.view(), data.lengths_view(), c.attend(), out.view(), lse.view());
  }

  // The gradients are laid out like their tensors; gaps keep their poison.
  Gradients backward(int num_threads = 2) const {
    Gradients g{data.q, data.k, data.v, Tensor<3>(DataType::kFloat32, data.scores.shape())};
    for (auto* t : {&g.dq, &g.dk, &g.dv}) t->poison();
    attend_backward(cpu_context(num_threads), data.q.view(), data.k.view(), data.v.view(),
                    data.scores.view(), view(), data.lengths_view(), c.attend(), out.view(),
                    lse.view(), dout.view(), g.dq.view(), g.dk.view(), g.dv.view(),
                    g.dscores.view());
    return g;
  }

  // Of the same numbers and the same selection, out and lse included, all in float64.
  Gradients reference() const {
    constexpr DataType kDouble = DataType::kFloat64;
    Context context;
    context.backend = Backend::kReference;
    auto const q = data.q.as(kDouble), k = data.k.as(kDouble), v = data.v.as(kDouble);
    auto const scores = data.scores.as(kDouble), threshold = selection.threshold.as(kDouble);
    Gradients g{Tensor<4>(kDouble, q.shape()), Tensor<4>(kDouble, k.shape()),
                Tensor<4>(kDouble, k.shape()), Tensor<3>(kDouble, scores.shape())};
    ReferenceResult const forward = attend_reference(c, data, selection);
    ConstSelectionView view64(selection.expiry.view());
    view64.threshold = threshold.view();
    view64.last_candidate = selection.last_candidate.view();
    auto const dout64 = dout.as(kDouble);
    attend_backward(context, q.view(), k.view(), v.view(), scores.view(), view64,
                    data.lengths_view(), c.attend(), forward.out.view(), forward.lse.view(),
                    dout64.view(), g.dq.view(), g.dk.view(), g.dv.view(), g.dscores.view());
    return g;
  }

  ConstSelectionView view() const {
    ConstSelectionView view(selection.expiry.view());
    view.threshold = selection.threshold.view();
    view.last_candidate = selection.last_candidate.view();
    return view;
  }

  Case c;
  CaseData data;
  SelectionTensors selection;
  Tensor<4> out, dout;
  Tensor<3> lse;
};

// The gradients' errors scale with the largest of them: each is a sum of terms that were rounded to
// the dtype (P, dS and out), and of hundreds of them in float32.
template <std::size_t Rank>
void expect_close(char const* name, DataType dtype, Tensor<Rank> const& ours,
                  Tensor<Rank> const& reference) {
  double largest = 1.0;
  reference.for_each(
      [&](auto const& i) { largest = std::max(largest, std::fabs(reference.get(i))); });
  double const unit = dtype == DataType::kBFloat16  ? 0x1p-7
                      : dtype == DataType::kFloat16 ? 0x1p-10
                                                    : 0x1p-18;
  std::int64_t failures = 0;
  reference.for_each([&](auto const& i) {
    double const expected = reference.get(i), got = ours.get(i);
    if (std::fabs(got - expected) <= unit * largest) return;
    if (++failures > 2) return;
    std::string at;
    for (std::int64_t const x : i) at += (at.empty() ? "" : ", ") + std::to_string(x);
    ADD_FAILURE() << name << "[" << at << "] = " << got << ", reference " << expected
                  << ", largest " << largest;
  });
  EXPECT_EQ(failures, 0) << name;
}

void expect_close(DataType dtype, Gradients const& ours, Gradients const& reference) {
  expect_close("dq", dtype, ours.dq, reference.dq);
  expect_close("dk", dtype, ours.dk, reference.dk);
  expect_close("dv", dtype, ours.dv, reference.dv);
  expect_close("dscores", dtype, ours.dscores, reference.dscores);
}

class AttendBackwardCase : public ::testing::TestWithParam<Case> {};

TEST_P(AttendBackwardCase, MatchesReference) {
  for (DataType const dtype : kDtypes) {
    Problem const problem(GetParam(), dtype);
    Gradients const reference = problem.reference();
    for (std::string const& isa : machine_isas()) {
      SCOPED_TRACE(std::string(name_of(dtype)) + ", " + isa);
      ScopedIsa const scoped(isa);
      Gradients const ours = problem.backward();
      expect_close(dtype, ours, reference);
      for (int const num_threads : {1, 5}) {
        EXPECT_TRUE(problem.backward(num_threads).same_bits(ours))
            << num_threads << " threads give other bits than 2";
      }
    }
  }
}

// The reference takes seconds for the longest rows; cuts between runs have a test of their own.
std::vector<Case> rows_to_check() {
  std::vector<Case> rows;
  for (Case const& c : case_table()) {
    if (c.seq_len_k <= 1000) rows.push_back(c);
  }
  return rows;
}

INSTANTIATE_TEST_SUITE_P(Table, AttendBackwardCase, ::testing::ValuesIn(rows_to_check()),
                         [](auto const& info) { return info.param.name; });

// Long enough for a (sequence, KV head) to be cut into runs whose partial gradients are added up.
TEST(AttendBackward, CutsBetweenRuns) {
  for (std::int64_t const chunk_size : {1, 16, 128, 1000}) {
    for (std::int64_t const num_selected : {64, 1500, 5000}) {
      for (bool const ragged : {false, true}) {
        SCOPED_TRACE("C = " + std::to_string(chunk_size) + ", k = " + std::to_string(num_selected));
        Case const c{"cuts",
                     ragged ? 4 : 1,
                     2,
                     1,
                     3300,
                     3500,
                     8,
                     {num_selected, 70, chunk_size, std::nullopt},
                     chunk_size == 16 ? Gate::kValue : Gate::kSoftmax,
                     "normal",
                     ragged ? "ragged" : "none",
                     "bhsd"};
        if (ragged && num_selected != 64) continue;
        Problem const problem(c, DataType::kFloat32);
        Gradients const ours = problem.backward();
        expect_close(DataType::kFloat32, ours, problem.reference());
        EXPECT_TRUE(problem.backward(3).same_bits(ours));
      }
    }
  }
}

// The gradient through the threshold alone: gates of 1 where selected, so that only the keys outside
// the selection lie in the threshold's support, or in the support but unselected.
TEST(AttendBackward, ThresholdTerm) {
  for (Gate const gate : {Gate::kValue, Gate::kSoftmax}) {
    Case c{"threshold", 1, 1, 1, 6, 6, 4, {2, 0, 1, 4}, gate, "normal", "none", "bhsd"};
    // Query 5 selects keys 0 and 1; 2 and 3 are in the support of the threshold, 4 is not a
    // candidate (M = 4 leaves it out only by its rank: 5th).
    std::array<double, 6> const u{0.9, 0.8, 0.7, 0.6, 0.5, 0.0};
    Problem problem(c, DataType::kFloat32);
    for (std::int64_t j = 0; j < 6; ++j) problem.data.scores.set({0, 0, j}, u[j]);
    select(cpu_context(), problem.data.scores.view(), std::nullopt, c.select,
           problem.selection.view());
    attend(cpu_context(), problem.data.q.view(), problem.data.k.view(), problem.data.v.view(),
           problem.data.scores.view(), problem.selection.view(), std::nullopt, c.attend(),
           problem.out.view(), problem.lse.view());
    problem.dout.for_each([&](auto const& i) {
      if (i[2] != 5) problem.dout.set(i, 0.0);
    });
    Gradients const ours = problem.backward();
    // All four are in the support: those outside the selection get minus the mean, as do those in
    // it, on top of their own.
    double const mean = -ours.dscores.get({0, 0, 2});
    EXPECT_NE(mean, 0.0);
    EXPECT_EQ(ours.dscores.get({0, 0, 3}), -mean);
    EXPECT_EQ(ours.dscores.get({0, 0, 4}), 0.0);
    EXPECT_EQ(ours.dscores.get({0, 0, 5}), 0.0);
    double sum = 0.0;
    for (std::int64_t j = 0; j < 6; ++j) sum += ours.dscores.get({0, 0, j});
    EXPECT_NEAR(sum, 0.0, 1e-6);
    expect_close(DataType::kFloat32, ours, problem.reference());
  }
}

// Where every gate is 0 or 1 there is nothing to move: scores 1 apart have tau = u_(k) - 1.
TEST(AttendBackward, SaturatedGatesHaveNoGradient) {
  Case const c{"saturated",    1,           1,      1,     300, 300, 8, {16, 8, 16, std::nullopt},
               Gate::kSoftmax, "ascending", "none", "bhsd"};
  Problem problem(c, DataType::kFloat32);
  problem.data.scores.for_each(
      [&](auto const& i) { problem.data.scores.set(i, static_cast<double>(2 * i[2])); });
  select(cpu_context(), problem.data.scores.view(), std::nullopt, c.select,
         problem.selection.view());
  Gradients const ours = problem.backward();
  ours.dscores.for_each([&](auto const& i) { ASSERT_EQ(ours.dscores.get(i), 0.0); });
}

TEST(AttendBackward, WithoutDscoresTheOthersAreTheSame) {
  Problem const problem(case_named("c16_softmax"), DataType::kFloat32);
  Gradients const expected = problem.backward();
  Gradients g{problem.data.q, problem.data.k, problem.data.v, {}};
  ConstSelectionView view = problem.view();
  view.last_candidate.reset();
  attend_backward(cpu_context(), problem.data.q.view(), problem.data.k.view(),
                  problem.data.v.view(), problem.data.scores.view(), view, std::nullopt,
                  problem.c.attend(), problem.out.view(), problem.lse.view(), problem.dout.view(),
                  g.dq.view(), g.dk.view(), g.dv.view(), std::nullopt);
  EXPECT_TRUE(g.dq.memory() == expected.dq.memory() && g.dk.memory() == expected.dk.memory() &&
              g.dv.memory() == expected.dv.memory());
}

// A foreign selection: expiry alone, here beyond the sequence, at the key itself and in between.
TEST(AttendBackward, ForeignSelection) {
  Case const c{"foreign",   2,        4,        2,       200, 300, 24, {0, 0, 1, std::nullopt},
               Gate::kNone, "normal", "ragged", "sliced"};
  Problem problem(c, DataType::kFloat32);
  problem.selection.expiry.for_each([&](auto const& i) {
    std::int64_t const life = i[2] % 7 == 0 ? 1000 : i[2] % 5 == 0 ? -3 : 40 + i[2] % 100;
    problem.selection.expiry.set(i, static_cast<double>(i[2] + life));
  });
  auto const run = [&](Context const& context, auto const& q, auto const& k, auto const& v,
                       Tensor<4>& out, Tensor<3>& lse, auto const& dout, Gradients& g) {
    AttendOptions options = c.attend();
    options.origin = SelectionOrigin::kForeign;
    ConstSelectionView const view(problem.selection.expiry.view());
    auto const lengths = problem.data.lengths_view();
    attend(context, q.view(), k.view(), v.view(), std::nullopt, view, lengths, options, out.view(),
           lse.view());
    attend_backward(context, q.view(), k.view(), v.view(), std::nullopt, view, lengths, options,
                    out.view(), lse.view(), dout.view(), g.dq.view(), g.dk.view(), g.dv.view(),
                    g.dscores.view());
  };
  CaseData const& data = problem.data;
  Gradients ours{data.q, data.k, data.v, Tensor<3>(DataType::kFloat32, data.scores.shape())};
  run(cpu_context(), data.q, data.k, data.v, problem.out, problem.lse, problem.dout, ours);
  constexpr DataType kDouble = DataType::kFloat64;
  Context context;
  context.backend = Backend::kReference;
  auto const q = data.q.as(kDouble), k = data.k.as(kDouble), v = data.v.as(kDouble);
  Gradients reference{Tensor<4>(kDouble, q.shape()), Tensor<4>(kDouble, k.shape()),
                      Tensor<4>(kDouble, k.shape()), Tensor<3>(kDouble, data.scores.shape())};
  Tensor<4> out(kDouble, q.shape());
  Tensor<3> lse = make_lse(c, kDouble);
  run(context, q, k, v, out, lse, problem.dout.as(kDouble), reference);
  expect_close(DataType::kFloat32, ours, reference);
}

TEST(AttendBackward, WrongCalls) {
  Problem const problem(case_named("c16_softmax"), DataType::kFloat32);
  auto const message_of = [&](auto const& change) -> std::string {
    Gradients g{problem.data.q, problem.data.k, problem.data.v,
                Tensor<3>(DataType::kFloat32, problem.data.scores.shape())};
    ConstSelectionView selection = problem.view();
    ConstTensorView<4> dout = problem.dout.view();
    TensorView<4> dq = g.dq.view(), dk = g.dk.view();
    TensorView<3> dscores = g.dscores.view();
    change(selection, dout, dq, dk, dscores);
    try {
      attend_backward(cpu_context(), problem.data.q.view(), problem.data.k.view(),
                      problem.data.v.view(), problem.data.scores.view(), selection, std::nullopt,
                      problem.c.attend(), problem.out.view(), problem.lse.view(), dout, dq, dk,
                      g.dv.view(), dscores);
    } catch (InvalidArgument const& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message_of([](auto& selection, auto&...) { selection.last_candidate.reset(); }),
            "last_candidate: expected the selection's, which dscores needs, got none");
  EXPECT_EQ(message_of([](auto&, auto& dout, auto&...) { dout.dtype = DataType::kFloat16; }),
            "dout: expected dtype float32, got float16");
  EXPECT_EQ(message_of([](auto&, auto&, auto& dq, auto&...) { dq.shape[2] = 512; }),
            "dq: expected shape [B, Hq, Sq, D] = [1, 2, 513, 64], got [1, 2, 512, 64]");
  EXPECT_EQ(message_of([](auto&, auto&, auto&, auto& dk, auto&) { dk.stride[1] = 0; }),
            "dk: expected an output whose elements do not overlap, got strides [65664, 0, 64, 1]");
  EXPECT_EQ(message_of([](auto&, auto&, auto&, auto&, auto& dscores) { dscores.stride[2] = 2; }),
            "dscores: expected contiguous strides [1026, 513, 1], got [1026, 513, 2]");
}

// Keys without queries: nothing but zeros.
TEST(AttendBackward, NoQueries) {
  Case const c{"none",         2,        2,      1,     0, 40, 8, {4, 4, 16, std::nullopt},
               Gate::kSoftmax, "normal", "none", "bhsd"};
  for (Backend const backend : {Backend::kCpu, Backend::kReference}) {
    Problem const problem(c, DataType::kFloat32);
    Gradients g{problem.data.q, problem.data.k, problem.data.v,
                Tensor<3>(DataType::kFloat32, problem.data.scores.shape())};
    Context context;
    context.backend = backend;
    attend_backward(context, problem.data.q.view(), problem.data.k.view(), problem.data.v.view(),
                    problem.data.scores.view(), problem.view(), std::nullopt, c.attend(),
                    problem.out.view(), problem.lse.view(), problem.dout.view(), g.dq.view(),
                    g.dk.view(), g.dv.view(), g.dscores.view());
    g.dk.for_each([&](auto const& i) {
      ASSERT_EQ(g.dk.get(i), 0.0);
      ASSERT_EQ(g.dv.get(i), 0.0);
    });
    g.dscores.for_each([&](auto const& i) { ASSERT_EQ(g.dscores.get(i), 0.0); });
  }
}

}  // namespace
}  // namespace sparsek::testing
