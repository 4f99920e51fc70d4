// Threads of the CPU backend.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace sparsek::cpu {

// The number of processors that this process may run on (its affinity mask on Linux).
int available_processors();

// Context::num_threads with 0 resolved, at most `num_tasks` and at least 1.
int resolve_threads(int num_threads, std::int64_t num_tasks);

// Calls body(0) ... body(num_threads - 1) at the same time, each on its own thread, body(0) on the
// caller's, and returns when all are done. The first exception of any of them is thrown again here.
//
// The threads persist between calls. Calls from several threads of the process run one after
// another. A forked child gets new threads.
void run_on_threads(int num_threads, std::function<void(int)> const& body);

// Tasks 0 ... num_tasks - 1, each handed out once, in order.
class TaskQueue {
 public:
  explicit TaskQueue(std::int64_t num_tasks) : num_tasks_(num_tasks) {}
  // The next task, or -1 when none is left.
  std::int64_t next() {
    std::int64_t const task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < num_tasks_ ? task : -1;
  }

 private:
  std::int64_t num_tasks_;
  std::atomic<std::int64_t> next_{0};
};

// Runs tasks 0 ... num_tasks - 1 on as many threads as Context::num_threads allows. Each thread calls
// make_body() once, which may hold what a thread needs of its own, and the result with one task
// after another.
template <typename MakeBody>
void for_each_task(int num_threads, std::int64_t num_tasks, MakeBody const& make_body) {
  if (num_tasks == 0) return;
  TaskQueue queue(num_tasks);
  run_on_threads(resolve_threads(num_threads, num_tasks), [&](int) {
    auto body = make_body();
    for (std::int64_t task; (task = queue.next()) >= 0;) body(task);
  });
}

}  // namespace sparsek::cpu
