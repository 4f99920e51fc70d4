// Properties that hold for every input, and what the case table has no row for.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "case_data.hpp"
#include "scoped_isa.hpp"

namespace sparsek::testing {
namespace {

Case const kSmall{"small",        1,        2,      2,     200, 200, 48, {20, 30, 16, std::nullopt},
                  Gate::kSoftmax, "normal", "none", "bhsd"};

struct Forward {
  Forward(Case const& c, DataType dtype, CaseData const& data) : selection(c, DataType::kFloat32) {
    out = make_output(c, dtype);
    lse = make_lse(c, DataType::kFloat32);
    select(Context{}, data.scores.view(), data.lengths_view(), c.select, selection.view());
    attend(Context{}, data.q.view(), data.k.view(), data.v.view(), data.scores.view(),
           selection.view(), data.lengths_view(), c.attend(), out.view(), lse.view());
  }

  SelectionTensors selection;
  Tensor<4> out;
  Tensor<3> lse;
};

// Every key of the pool is selected with gate 1: causal attention, written out here without the
// library.
TEST(AttendProperty, SelectingEverythingIsDenseCausalAttention) {
  Case c = kSmall;
  c.select.num_selected = c.seq_len_k;
  for (Gate const gate : {Gate::kNone, Gate::kValue, Gate::kSoftmax}) {
    c.gate = gate;
    CaseData const data(c, DataType::kFloat32);
    Forward const run(c, DataType::kFloat32, data);
    for (std::int64_t h = 0; h < c.num_q_heads; ++h) {
      for (std::int64_t i = 0; i < c.seq_len_q; ++i) {
        std::vector<double> weights(i + 1);
        double sum = 0.0;
        for (std::int64_t j = 0; j <= i; ++j) {
          double dot = 0.0;
          for (std::int64_t d = 0; d < c.head_dim; ++d) {
            dot += data.q.get({0, h, i, d}) * data.k.get({0, h, j, d});
          }
          sum += weights[j] = std::exp(dot / std::sqrt(48.0));
        }
        EXPECT_NEAR(run.lse.get({0, h, i}), std::log(sum), 1e-5);
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          double expected = 0.0;
          for (std::int64_t j = 0; j <= i; ++j)
            expected += weights[j] / sum * data.v.get({0, h, j, d});
          ASSERT_NEAR(run.out.get({0, h, i, d}), expected, 1e-5);
        }
      }
    }
  }
}

// A key that outlives its window never outlives one that ranks before it.
TEST(SelectProperty, ExpiryIsMonotoneWithRank) {
  for (char const* name :
       {"c1_value", "c16_softmax", "ties", "scores_half_gap", "window_300", "ragged"}) {
    SCOPED_TRACE(name);
    Case const& c = case_named(name);
    CaseData const data(c, DataType::kFloat32);
    SelectionTensors selection(c, DataType::kFloat32);
    select(Context{}, data.scores.view(), data.lengths_view(), c.select, selection.view());
    std::int64_t const n = data.length(0);
    std::vector<std::int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return data.scores.get({0, 0, a}) > data.scores.get({0, 0, b});
    });
    double earliest = static_cast<double>(n);  // expiry of the keys that rank before
    for (std::int64_t const j : order) {
      double const expiry = selection.expiry.get({0, 0, j});
      std::int64_t const chunk = (j + c.select.window) / c.select.chunk_size + 1;
      auto const window_end = static_cast<double>(std::min(n, chunk * c.select.chunk_size));
      EXPECT_GE(expiry, window_end);
      EXPECT_LE(expiry, std::max(earliest, window_end));
      earliest = std::min(earliest, expiry);
    }
  }
}

TEST(AttendProperty, ShufflingHeadsShufflesTheOutput) {
  Case const& c = case_named("group_3");
  for (DataType const dtype : {DataType::kFloat32, DataType::kBFloat16}) {
    CaseData const data(c, dtype);
    CaseData shuffled(c, dtype);
    std::int64_t const group = c.num_q_heads / c.num_kv_heads;
    // KV heads are exchanged, and the query heads within each group are turned by one.
    auto const source = [&](std::int64_t h) {
      return (1 - h / group) * group + (h % group + 1) % group;
    };
    shuffled.q.for_each(
        [&](auto const& i) { shuffled.q.set(i, data.q.get({i[0], source(i[1]), i[2], i[3]})); });
    shuffled.k.for_each([&](auto const& i) {
      shuffled.k.set(i, data.k.get({i[0], 1 - i[1], i[2], i[3]}));
      shuffled.v.set(i, data.v.get({i[0], 1 - i[1], i[2], i[3]}));
    });
    shuffled.scores.for_each(
        [&](auto const& i) { shuffled.scores.set(i, data.scores.get({i[0], 1 - i[1], i[2]})); });
    Forward const plain(c, dtype, data), other(c, dtype, shuffled);
    other.out.for_each([&](auto const& i) {
      ASSERT_EQ(other.out.get(i), plain.out.get({i[0], source(i[1]), i[2], i[3]}));
    });
    other.lse.for_each([&](auto const& i) {
      ASSERT_EQ(other.lse.get(i), plain.lse.get({i[0], source(i[1]), i[2]}));
    });
  }
}

// NaN in one head's keys, or in one query, changes no bit elsewhere and does not disappear.
TEST(AttendProperty, NanStaysWhereItIs) {
  for (std::string const& isa : machine_isas()) {
    ScopedIsa const scoped(isa);
    for (DataType const dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
      SCOPED_TRACE(isa + ", " + name_of(dtype));
      CaseData data(kSmall, dtype);
      Forward const clean(kSmall, dtype, data);
      double const nan = std::numeric_limits<double>::quiet_NaN();
      data.k.set({0, 1, 3, 0}, nan);
      data.q.set({0, 0, 77, 5}, nan);
      Forward const dirty(kSmall, dtype, data);
      dirty.out.for_each([&](auto const& i) {
        if (i[1] == 1) {
          if (i[2] == 3) {
            ASSERT_TRUE(std::isnan(dirty.out.get(i)));
          }
        } else if (i[2] == 77) {
          ASSERT_TRUE(std::isnan(dirty.out.get(i)));
        } else {
          ASSERT_EQ(dirty.out.get(i), clean.out.get(i)) << join(i);
        }
      });
    }
  }
}

// Any method that drops keys for good is an expiry; such a selection has neither thresholds nor a
// configuration.
TEST(AttendProperty, ForeignSelectionMatchesReference) {
  std::mt19937 random(11);
  for (std::int64_t const num_queries : {200, 3}) {
    Case c = kSmall;
    c.gate = Gate::kNone;
    c.seq_len_q = num_queries;
    CaseData const data(c, DataType::kFloat32);
    Tensor<3> expiry(DataType::kInt32, {1, 2, 200});
    expiry.for_each([&](auto const& i) {
      // Some keys are never seen, some beyond the end of the sequence; 60 ... 79 leave rows without
      // any key.
      auto const lifetime = static_cast<std::int64_t>(random() % 150);
      expiry.set(i, static_cast<double>(i[2] < 80 ? std::min<std::int64_t>(i[2] + lifetime, 60)
                                                  : i[2] + lifetime));
    });
    AttendOptions options;
    options.gate = Gate::kNone;
    Tensor<4> ours = make_output(c, DataType::kFloat32),
              reference = make_output(c, DataType::kFloat32);
    Tensor<3> our_lse = make_lse(c, DataType::kFloat32), lse = make_lse(c, DataType::kFloat32);
    Context specification;
    specification.backend = Backend::kReference;
    ConstSelectionView const selection(expiry.view());
    attend(Context{}, data.q.view(), data.k.view(), data.v.view(), std::nullopt, selection,
           std::nullopt, options, ours.view(), our_lse.view());
    attend(specification, data.q.view(), data.k.view(), data.v.view(), std::nullopt, selection,
           std::nullopt, options, reference.view(), lse.view());
    ours.for_each(
        [&](auto const& i) { ASSERT_NEAR(ours.get(i), reference.get(i), 1e-5) << join(i); });
    our_lse.for_each([&](auto const& i) {
      if (std::isinf(lse.get(i))) {
        ASSERT_EQ(our_lse.get(i), lse.get(i));
      } else {
        ASSERT_NEAR(our_lse.get(i), lse.get(i), 1e-5);
      }
    });
  }
}

TEST(AttendProperty, LseIsOptional) {
  CaseData const data(kSmall, DataType::kFloat32);
  Forward const with(kSmall, DataType::kFloat32, data);
  Tensor<4> out = make_output(kSmall, DataType::kFloat32);
  SelectionTensors selection = with.selection;
  attend(Context{}, data.q.view(), data.k.view(), data.v.view(), data.scores.view(),
         selection.view(), std::nullopt, kSmall.attend(), out.view(), std::nullopt);
  EXPECT_TRUE(out.memory() == with.out.memory());
}

// A large group is processed in several passes over the keys.
TEST(AttendProperty, LargeGroupEqualsRepeatedKeys) {
  Case c = kSmall;
  c.num_q_heads = 24;
  c.num_kv_heads = 1;
  CaseData const data(c, DataType::kFloat32);
  Forward const grouped(c, DataType::kFloat32, data);
  Case single = c;
  single.num_q_heads = 1;
  for (std::int64_t h = 0; h < c.num_q_heads; ++h) {
    CaseData one(single, DataType::kFloat32);
    one.q.for_each([&](auto const& i) { one.q.set(i, data.q.get({0, h, i[2], i[3]})); });
    one.k = data.k;
    one.v = data.v;
    one.scores = data.scores;
    Forward const run(single, DataType::kFloat32, one);
    run.out.for_each([&](auto const& i) {
      ASSERT_NEAR(run.out.get(i), grouped.out.get({0, h, i[2], i[3]}), 1e-6);
    });
  }
}

TEST(Score, MatchesReference) {
  for (char const* name :
       {"one_token", "ragged_few_queries", "layout_bshd", "head_dim_33", "head_dim_80"}) {
    Case const& c = case_named(name);
    for (DataType const dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
      CaseData const data(c, dtype);
      Tensor<3> reference(DataType::kFloat32, {c.batch, c.num_kv_heads, c.seq_len_k});
      Context specification;
      specification.backend = Backend::kReference;
      key_norm_scores(specification, data.k.view(), data.lengths_view(), reference.view());
      for (std::string const& isa : machine_isas()) {
        SCOPED_TRACE(std::string(name) + ", " + name_of(dtype) + ", " + isa);
        ScopedIsa const scoped(isa);
        Tensor<3> ours(DataType::kFloat32, reference.shape());
        key_norm_scores(Context{}, data.k.view(), data.lengths_view(), ours.view());
        ours.for_each([&](auto const& i) { ASSERT_NEAR(ours.get(i), reference.get(i), 1e-5); });
      }
    }
  }
}

// Infinities and subnormal numbers go through the conversions unharmed.
TEST(Score, ConvertsEveryHalf) {
  constexpr std::int64_t kCount = 1 << 16;
  Tensor<4> k(DataType::kFloat16, {1, 1, kCount, 1});
  for (std::int64_t j = 0; j < kCount; ++j)
    k.data<std::uint16_t>()[j] = static_cast<std::uint16_t>(j);
  for (std::string const& isa : machine_isas()) {
    ScopedIsa const scoped(isa);
    Tensor<3> scores(DataType::kFloat32, {1, 1, kCount});
    key_norm_scores(Context{}, k.view(), std::nullopt, scores.view());
    for (std::int64_t j = 0; j < kCount; ++j) {
      double const x = k.get({0, 0, j, 0}), got = scores.get({0, 0, j});
      if (std::isnan(x)) {
        ASSERT_TRUE(std::isnan(got));
      } else if (std::isinf(x)) {
        ASSERT_TRUE(std::isinf(got));
      } else {
        ASSERT_NEAR(got, -std::fabs(x), 1e-6 * std::fabs(x)) << isa << ", bits " << j;
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::testing
