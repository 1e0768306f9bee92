// Entry points of the CPU backend, the counterpart of csrc/cuda/launch.h. They run on the caller's threads, and results
// do not depend on the number of threads: partition and order of merging follow from the layout alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/params.h"

namespace fastbn::cpu {

// The caller's way to run a task over [0, count) in parallel. `grain` is the minimum number of items per thread.
struct Threads {
  int count = 1;
  void (*run)(int64_t count, int64_t grain, void (*task)(int64_t begin, int64_t end, void* context), void* context);

  // Calls `function(begin, end)` for ranges that together cover all items.
  template <class Function>
  void for_each_range(int64_t items, int64_t grain, Function&& function) const {
    auto task = [](int64_t begin, int64_t end, void* context) {
      (*static_cast<std::remove_reference_t<Function>*>(context))(begin, end);
    };
    if (items > 0) run(items, grain, task, &function);
  }

  // Calls `function(i)` for every item.
  template <class Function>
  void for_each(int64_t items, int64_t grain, Function&& function) const {
    for_each_range(items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) function(i);
    });
  }
};

// Runs the training forward (statistics of the batch), evaluation (running) or normalisation (given), as
// `params.statistics` says.
void forward(const ForwardParams& params, const Threads& threads);

// Computes mean and var of the batch.
void channel_stats(const ForwardParams& params, const Threads& threads);

// Computes every gradient that has a pointer. `params.statistics` is batch, running (frozen) or given.
void backward(const BackwardParams& params, const Threads& threads);

// Computes sum_grad and sum_grad_xhat of the batch.
void grad_sums(const BackwardParams& params, const Threads& threads);

}  // namespace fastbn::cpu
