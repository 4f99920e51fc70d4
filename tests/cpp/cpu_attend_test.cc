// attend on the CPU against the fp64 reference, over the case table, every dtype and every
// instruction set of the machine.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "case_data.hpp"
#include "scoped_isa.hpp"

namespace sparsek::testing {
namespace {

constexpr DataType kDtypes[] = {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16};

Context cpu_context(int num_threads) {
  Context context;
  context.backend = Backend::kCpu;
  context.num_threads = num_threads;
  return context;
}

struct Result {
  Tensor<4> out;
  Tensor<3> lse;
};

Result attend_cpu(Case const& c, DataType dtype, CaseData const& data, SelectionTensors& selection,
                  int num_threads) {
  Result result{make_output(c, dtype), make_lse(c, DataType::kFloat32)};
  attend(cpu_context(num_threads), data.q.view(), data.k.view(), data.v.view(), data.scores.view(),
         selection.view(), data.lengths_view(), c.attend(), result.out.view(), result.lse.view());
  return result;
}

void expect_close(DataType dtype, Result const& ours, ReferenceResult const& reference) {
  std::int64_t failures = 0;
  reference.out.for_each([&](auto const& i) {
    double const expected = reference.out.get(i), got = ours.out.get(i);
    if (std::fabs(got - expected) <= output_tolerance(dtype, expected)) return;
    if (++failures <= 3)
      ADD_FAILURE() << "out[" << join(i) << "] = " << got << ", reference " << expected;
  });
  reference.lse.for_each([&](auto const& i) {
    double const expected = reference.lse.get(i), got = ours.lse.get(i);
    if (got == expected || std::fabs(got - expected) <= 4e-6 * (1.0 + std::fabs(expected))) return;
    if (++failures <= 6) {
      ADD_FAILURE() << "lse[" << i[0] << ", " << i[1] << ", " << i[2] << "] = " << got
                    << ", reference " << expected;
    }
  });
  EXPECT_EQ(failures, 0);
}

class AttendCase : public ::testing::TestWithParam<Case> {};

TEST_P(AttendCase, MatchesReference) {
  Case const& c = GetParam();
  for (DataType const dtype : kDtypes) {
    CaseData const data(c, dtype);
    SelectionTensors selection(c, DataType::kFloat32);
    select(cpu_context(2), data.scores.view(), data.lengths_view(), c.select, selection.view());
    ReferenceResult const reference = attend_reference(c, data, selection);
    for (std::string const& isa : machine_isas()) {
      SCOPED_TRACE(std::string(name_of(dtype)) + ", " + isa);
      ScopedIsa const scoped(isa);
      Result const ours = attend_cpu(c, dtype, data, selection, 2);
      expect_close(dtype, ours, reference);
      // Work is split over threads in any shape without a change of any bit (gaps between rows,
      // which are never written, included).
      for (int const num_threads : {1, 5}) {
        Result const other = attend_cpu(c, dtype, data, selection, num_threads);
        EXPECT_TRUE(other.out.memory() == ours.out.memory() &&
                    other.lse.memory() == ours.lse.memory())
            << num_threads << " threads give other bits than 2";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, AttendCase, ::testing::ValuesIn(case_table()),
                         [](auto const& info) { return info.param.name; });

}  // namespace
}  // namespace sparsek::testing
