#include "cpu/thread_pool.hpp"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace sparsek::cpu {
namespace {

class ThreadPool {
 public:
  void run(int num_threads, std::function<void(int)> const& body) {
    std::lock_guard<std::mutex> const one_job(job_mutex_);
    {
      std::lock_guard<std::mutex> const lock(mutex_);
      while (num_workers_ < num_threads - 1) start_worker();
      body_ = &body;
      job_threads_ = num_threads;
      running_ = num_threads - 1;
      error_ = nullptr;
      ++job_;
    }
    wake_.notify_all();
    call(body, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    body_ = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // The pool lives as long as the process, so its threads are never joined.
  void start_worker() {
    int const index = num_workers_ + 1;
    std::thread([this, index, seen = job_] { work(index, seen); }).detach();
    ++num_workers_;
  }

  void work(int index, std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (index >= job_threads_) continue;
      std::function<void(int)> const& body = *body_;
      lock.unlock();
      call(body, index);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void call(std::function<void(int)> const& body, int index) {
    try {
      body(index);
    } catch (...) {
      std::lock_guard<std::mutex> const lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex job_mutex_;  // held by the caller of the job that runs
  std::mutex mutex_;      // guards all below
  std::condition_variable wake_, done_;
  std::function<void(int)> const* body_ = nullptr;
  std::exception_ptr error_;
  std::uint64_t job_ = 0;
  int job_threads_ = 0, running_ = 0, num_workers_ = 0;
};

std::atomic<ThreadPool*> g_pool{nullptr};

// A forked child has the parent's pool object but none of its threads: it starts over. The old
// object is left alone, since its mutexes may have been held at the time of the fork.
void forget_pool() { g_pool.store(nullptr); }

ThreadPool& pool() {
  static std::once_flag registered;
#if defined(__unix__) || defined(__APPLE__)
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
#endif
  ThreadPool* current = g_pool.load();
  if (!current) {
    auto* const fresh = new ThreadPool;  // lives as long as the process
    if (g_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

int available_processors() {
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) return std::max(1, CPU_COUNT(&mask));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int resolve_threads(int num_threads, std::int64_t num_tasks) {
  std::int64_t const wanted = num_threads > 0 ? num_threads : available_processors();
  return static_cast<int>(std::clamp<std::int64_t>(num_tasks, 1, wanted));
}

void run_on_threads(int num_threads, std::function<void(int)> const& body) {
  if (num_threads <= 1) {
    body(0);
  } else {
    pool().run(num_threads, body);
  }
}

}  // namespace sparsek::cpu
