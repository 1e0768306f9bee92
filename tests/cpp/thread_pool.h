// Threads that run the tasks of the CPU backend, as torch's do: they wait between tasks, so that each keeps its
// workspace. They ignore the grain, so that small tensors are shared among all threads.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/launch.h"

namespace fastbn::test {

// All threads begin a job together: if one could begin after another has ended, as behind a mutex, ThreadSanitizer
// would take the one's work to be ordered after the other's, and would report no race between them.
class ThreadPool {
 public:
  explicit ThreadPool(int count) : begin_(count), end_(count) {
    for (int i = 1; i < count; ++i) threads_.emplace_back([this, i] { work(i); });
  }
  ThreadPool(const ThreadPool&) = delete;
  ~ThreadPool() {
    job_ = nullptr;
    begin_.arrive_and_wait();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return int(threads_.size()) + 1; }

  // Calls `job(thread)` on every thread, the calling one among them, and waits for all.
  void run(const std::function<void(int)>& job) {
    job_ = &job;
    begin_.arrive_and_wait();
    job(0);
    end_.arrive_and_wait();
  }

 private:
  void work(int index) {
    for (;;) {
      begin_.arrive_and_wait();
      if (!job_) return;
      (*job_)(index);
      end_.arrive_and_wait();
    }
  }

  std::barrier<> begin_, end_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
};

// The pool whose threads run what the current thread calls.
inline thread_local ThreadPool* pool_of_caller = nullptr;

inline void run_on_pool(const std::function<void(int)>& job) { pool_of_caller->run(job); }

// Gives each thread consecutive items, as torch's parallel_for does.
inline void run_in_parts(int64_t count, int64_t, void (*task)(int64_t, int64_t, void*), void* context) {
  const int64_t part = (count + pool_of_caller->size() - 1) / pool_of_caller->size();
  run_on_pool([&](int thread) {
    const int64_t begin = std::min(thread * part, count), end = std::min(begin + part, count);
    if (begin < end) task(begin, end, context);
  });
}

// Gives neighbouring items to different threads.
inline void run_in_turn(int64_t count, int64_t, void (*task)(int64_t, int64_t, void*), void* context) {
  const int threads = pool_of_caller->size();
  run_on_pool([&](int thread) {
    for (int64_t i = thread; i < count; i += threads) task(i, i + 1, context);
  });
}

// Gives all items to every thread: a race wherever a task writes.
inline void run_overlapping(int64_t count, int64_t, void (*task)(int64_t, int64_t, void*), void* context) {
  run_on_pool([&](int) { task(0, count, context); });
}

}  // namespace fastbn::test
