// The CPU backend: the same operations as csrc/cuda/launch.h, on the caller's threads. Results do not depend on how
// many there are: the partition and the order of merging follow from the layout alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/params.h"

namespace fastbn::cpu {

// How to run a task over [0, count) in parallel; `grain` is the least number of items worth a thread.
struct Threads {
  int count = 1;
  void (*run)(int64_t count, int64_t grain, void (*task)(int64_t begin, int64_t end, void* context), void* context);

  // function(begin, end) over ranges that make up all items.
  template <class Function>
  void for_each_range(int64_t items, int64_t grain, Function&& function) const {
    auto task = [](int64_t begin, int64_t end, void* context) {
      (*static_cast<std::remove_reference_t<Function>*>(context))(begin, end);
    };
    if (items > 0) run(items, grain, task, &function);
  }

  template <class Function>
  void for_each(int64_t items, int64_t grain, Function&& function) const {
    for_each_range(items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) function(i);
    });
  }
};

// Train (statistics of the batch), evaluation (running) or normalise (given), by params.statistics.
void forward(const ForwardParams& params, const Threads& threads);

// mean and var of the batch.
void channel_stats(const ForwardParams& params, const Threads& threads);

// Every gradient that has a pointer, by params.statistics: batch, running (frozen) or given.
void backward(const BackwardParams& params, const Threads& threads);

// sum_grad and sum_grad_xhat of the batch.
void grad_sums(const BackwardParams& params, const Threads& threads);

}  // namespace fastbn::cpu
