// What the check programs share: rows prepared and compared by threads, one row at a time on the GPU,
// options, report.
//
//   <program> [--filter TEXT] [--backend portable|sm90|auto] [--dtype float16|bfloat16] [--quick]
//             [--repeat N] [--guard-bytes N] [--timeout S] [--threads N] [--verbose]
//
// --quick keeps small rows only; under compute-sanitizer add --guard-bytes 0, so that it sees each
// buffer's true end.
//
// Exit status: 0 all passed, 1 something failed, 2 wrong usage, 3 the GPU hung or was lost,
// 77 no GPU (ctest: skipped).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_check_on_gpu.hpp"

namespace sparsek::testing {

// What the summary says about one backend and dtype.
struct Tally {
  int passed = 0, failed = 0, unsupported = 0, chained = 0;
  double worst_fraction = 0.0;
  std::string worst_row;
  std::map<std::string, int> kernels;
};

struct Task {
  Row const* row;
  DataType dtype;
};

// Gpu<Rank> runs a row of its Problem on one backend after another, and compares.
template <template <std::size_t> class Gpu>
class Check {
 public:
  Check(CheckOptions const& options, std::vector<Row> rows)
      : options_(options), rows_(std::move(rows)) {
    options_.on_hang = [this] { summarise(); };
    cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      Row const& row = rows_[i];
      if (row.c.name.find(options.filter) == std::string::npos) continue;
      bool const small = row.size() <= 20'000 || (i % 16 == 0 && row.size() <= 200'000);
      if (options.quick && !small) continue;
      for (DataType const dtype : options.dtypes) tasks_.push_back({&row, dtype});
    }
  }

  int run() {
    std::vector<std::thread> threads;
    for (int i = 0; i < options_.num_threads; ++i) threads.emplace_back([this] { work(); });
    for (std::thread& t : threads) t.join();
    return summarise();
  }

 private:
  void work() {
    for (std::size_t i = next_++; i < tasks_.size() && !gpu_lost_; i = next_++) {
      Task const& task = tasks_[i];
      try {
        if (task.row->packed()) {
          run_task<3>(task);
        } else {
          run_task<4>(task);
        }
      } catch (CudaFailure const& e) {
        lose_gpu(task, e.what());
      } catch (DeviceError const& e) {
        lose_gpu(task, e.what());
      } catch (std::exception const& e) {
        std::lock_guard const lock(report_mutex_);
        std::printf("FAIL %s %s: the check itself: %s\n", task.row->c.name.c_str(),
                    sparsek::name_of(task.dtype), e.what());
        ++broken_;
      }
    }
  }

  void lose_gpu(Task const& task, char const* reason) {
    std::lock_guard const lock(report_mutex_);
    if (gpu_lost_.exchange(true)) return;
    std::printf("GPU LOST in %s %s: %s\n", task.row->c.name.c_str(), sparsek::name_of(task.dtype),
                reason);
  }

  template <std::size_t Rank>
  void run_task(Task const& task) {
    typename Gpu<Rank>::Problem const problem(*task.row, task.dtype);
    std::vector<typename Gpu<Rank>::Results> results;
    std::optional<Gpu<Rank>> gpu;
    {
      std::lock_guard const lock(gpu_mutex_);
      if (gpu_lost_) return;
      gpu.emplace(problem, options_, stream_);
      for (Backend const backend : options_.backends) results.push_back(gpu->run(backend));
      wait(stream_, options_, task.row->c.name);
    }
    for (std::size_t i = 0; i < results.size(); ++i) {
      gpu->compare(results[i]);
      report(task, options_.backends[i], results[i].outcome);
    }
    std::lock_guard const lock(gpu_mutex_);
    gpu.reset();
  }

  void report(Task const& task, Backend backend, Outcome const& outcome) {
    std::lock_guard const lock(report_mutex_);
    std::string const& row = task.row->c.name;
    for (std::string const& failure : outcome.failures) {
      std::printf("FAIL %s %s %s (%s): %s\n", row.c_str(), sparsek::name_of(task.dtype),
                  name_of(backend), outcome.kernel.c_str(), failure.c_str());
    }
    if (options_.verbose && outcome.failures.empty()) {
      std::printf("%s %s %s %s (%s): worst error %.2f of the tolerance\n",
                  outcome.verdict == Verdict::kPassed ? "pass" : "unsupported", row.c_str(),
                  sparsek::name_of(task.dtype), name_of(backend), outcome.kernel.c_str(),
                  outcome.worst_fraction);
    }
    std::fflush(stdout);
    Tally& tally = tallies_[{backend, task.dtype}];
    if (outcome.verdict == Verdict::kUnsupported) {
      ++tally.unsupported;
      return;
    }
    ++(outcome.verdict == Verdict::kPassed ? tally.passed : tally.failed);
    tally.chained += outcome.chained;
    ++tally.kernels[outcome.kernel];
    if (outcome.worst_fraction > tally.worst_fraction) {
      tally.worst_fraction = outcome.worst_fraction;
      tally.worst_row = row;
    }
  }

  int summarise() {
    std::lock_guard const lock(report_mutex_);
    int passed = 0, failed = broken_;
    for (auto const& [key, tally] : tallies_) {
      passed += tally.passed;
      failed += tally.failed;
      std::string kernels;
      for (auto const& [kernel, count] : tally.kernels) {
        kernels += " " + kernel + " x" + std::to_string(count);
      }
      std::printf(
          "%-8s %-8s: %d passed, %d failed, %d unsupported, %d chained; worst allowed error "
          "%.2f of the tolerance (%s); kernels:%s\n",
          name_of(key.first), sparsek::name_of(key.second), tally.passed, tally.failed,
          tally.unsupported, tally.chained, tally.worst_fraction, tally.worst_row.c_str(),
          kernels.c_str());
    }
    if (gpu_lost_) {
      std::printf("the GPU was lost: the remaining rows did not run\n");
      return kExitGpuLost;
    }
    std::printf("%zu rows x dtypes: %d passed, %d failed\n", tasks_.size(), passed, failed);
    return failed == 0 && passed > 0 ? 0 : kExitFailed;
  }

  CheckOptions options_;
  std::vector<Row> rows_;
  std::vector<Task> tasks_;
  cudaStream_t stream_ = nullptr;
  std::atomic<std::size_t> next_ = 0;
  std::atomic<bool> gpu_lost_ = false;
  std::mutex gpu_mutex_, report_mutex_;
  std::map<std::pair<Backend, DataType>, Tally> tallies_;
  int broken_ = 0;
};

inline CheckOptions parse_check_options(int argc, char** argv) {
  CheckOptions options;
  auto const fail = [](std::string const& message) { throw std::invalid_argument(message); };
  for (int i = 1; i < argc; ++i) {
    std::string const flag = argv[i];
    auto const value = [&]() -> std::string {
      if (i + 1 == argc) fail(flag + " needs a value");
      return argv[++i];
    };
    if (flag == "--filter") {
      options.filter = value();
    } else if (flag == "--backend") {
      std::string const name = value();
      std::erase_if(options.backends, [&](Backend b) { return name != name_of(b); });
      if (options.backends.empty()) fail("--backend: portable, sm90 or auto, got " + name);
    } else if (flag == "--dtype") {
      std::string const name = value();
      std::erase_if(options.dtypes, [&](DataType d) { return name != sparsek::name_of(d); });
      if (options.dtypes.empty()) fail("--dtype: float16 or bfloat16, got " + name);
    } else if (flag == "--quick") {
      options.quick = true;
    } else if (flag == "--verbose") {
      options.verbose = true;
    } else if (flag == "--repeat") {
      options.repeat = std::max(1, std::stoi(value()));
    } else if (flag == "--guard-bytes") {
      options.guard_bytes = (std::stoul(value()) + 255) / 256 * 256;  // keeps buffers aligned
    } else if (flag == "--timeout") {
      options.timeout_s = std::stod(value());
    } else if (flag == "--threads") {
      options.num_threads = std::max(1, std::stoi(value()));
    } else {
      fail("unknown option " + flag);
    }
  }
  return options;
}

// The whole program, over `rows`.
template <template <std::size_t> class Gpu>
int check_main(char const* program, std::vector<Row> rows, int argc, char** argv) {
  try {
    CheckOptions const options = parse_check_options(argc, argv);
    int count = 0;
    cudaError_t const status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
      std::printf("skipped: no CUDA device (%s)\n", cudaGetErrorString(status));
      return kExitSkipped;
    }
    return Check<Gpu>(options, std::move(rows)).run();
  } catch (std::invalid_argument const& e) {
    std::fprintf(stderr, "%s: %s\n", program, e.what());
    return kExitUsage;
  } catch (std::exception const& e) {
    std::fprintf(stderr, "%s: %s\n", program, e.what());
    return kExitFailed;
  }
}

}  // namespace sparsek::testing
