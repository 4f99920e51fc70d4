// Threads and choice of the instruction set.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "case_data.hpp"
#include "cpu/thread_pool.hpp"
#include "scoped_isa.hpp"

#if defined(__SANITIZE_THREAD__)
#define SPARSEK_TEST_UNDER_TSAN 1
#endif

namespace sparsek::testing {
namespace {

TEST(Threads, EachRunsOnce) {
  for (int const n : {1, 2, 7, 3}) {
    std::vector<std::atomic<int>> calls(n);
    cpu::run_on_threads(n, [&](int i) { ++calls[i]; });
    for (auto const& count : calls) EXPECT_EQ(count, 1);
  }
}

TEST(Threads, ExceptionReachesTheCallerAndThePoolSurvives) {
  for (int const thrower : {0, 1, 2}) {
    EXPECT_THROW(cpu::run_on_threads(3,
                                     [&](int i) {
                                       if (i == thrower) throw std::runtime_error("x");
                                     }),
                 std::runtime_error);
  }
  std::atomic<int> calls = 0;
  cpu::run_on_threads(3, [&](int) { ++calls; });
  EXPECT_EQ(calls, 3);
}

TEST(Threads, SeveralCallersAtOnce) {
  std::atomic<int> calls = 0;
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) cpu::run_on_threads(3, [&](int) { ++calls; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(calls, 4 * 50 * 3);
}

TEST(Threads, ForkedChildGetsNewOnes) {
#if defined(SPARSEK_TEST_UNDER_TSAN)
  GTEST_SKIP() << "ThreadSanitizer does not follow threads started in a forked child";
#endif
  std::atomic<int> calls = 0;
  cpu::run_on_threads(2, [&](int) { ++calls; });
  pid_t const child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    cpu::run_on_threads(2, [&](int) { ++calls; });
    _exit(calls == 4 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(Threads, ZeroMeansAllAndNeverMoreThanTasks) {
  EXPECT_EQ(cpu::resolve_threads(0, 1 << 30), cpu::available_processors());
  EXPECT_EQ(cpu::resolve_threads(8, 3), 3);
  EXPECT_EQ(cpu::resolve_threads(8, 0), 1);
}

TEST(Isa, EnvironmentChoosesALowerOne) {
  for (std::string const& isa : machine_isas()) {
    ScopedIsa const scoped(isa);
    EXPECT_EQ(cpu_isa(), isa);
  }
  ScopedIsa const empty("");
  EXPECT_EQ(cpu_isa(), machine_isas().back());
}

TEST(Isa, UnknownNameIsAnError) {
  ScopedIsa const scoped("avx1024");
  try {
    cpu_isa();
    FAIL() << "expected an InvalidArgument";
  } catch (InvalidArgument const& e) {
    std::string const message = e.what();
    EXPECT_NE(message.find("BLACKWELL_SPARSEK_CPU_ISA"), std::string::npos) << message;
    EXPECT_NE(message.find("avx1024"), std::string::npos) << message;
    EXPECT_NE(message.find("portable"), std::string::npos) << message;
  }
  // attend asks too, and throws before it starts any thread.
  Case const& c = case_named("two_tokens");
  CaseData const data(c, DataType::kFloat32);
  SelectionTensors selection(c, DataType::kFloat32);
  select(Context{}, data.scores.view(), std::nullopt, c.select, selection.view());
  Tensor<4> out = make_output(c, DataType::kFloat32);
  EXPECT_THROW(attend(Context{}, data.q.view(), data.k.view(), data.v.view(), data.scores.view(),
                      selection.view(), std::nullopt, c.attend(), out.view(), std::nullopt),
               InvalidArgument);
}

}  // namespace
}  // namespace sparsek::testing
