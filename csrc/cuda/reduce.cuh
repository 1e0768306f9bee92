// Sums and merges in a fixed order: of octets into accumulators, of threads over a block, of splits over a warp.
#pragma once

#include "cuda/device.cuh"
#include "cuda/loop.cuh"
#include "cuda/walk.cuh"
#include "math/plan.h"

namespace fastbn::cuda {

// Octets between promotions of a running sum to double: its error is that of 64 steps, however large the tensor.
constexpr int octets_a_promotion = 64;

// n sums of type A; an octet of terms goes to the eight of them, or all into the only one. The promoted totals are
// seldom touched and lie in shared memory, n of them, most_threads apart: in registers they would halve the occupancy.
template <class A, int n>
struct LongSum {
  static_assert(n == 1 || n == octet);
  A recent[n] = {};
  double* total;

  FASTBN_DEVICE explicit LongSum(double* totals) : total(totals + device::thread_index()) {
    FASTBN_UNROLL
    for (int i = 0; i < n; ++i) total[i * most_threads] = 0;
  }

  FASTBN_DEVICE void add(const A (&term)[octet]) {
    if constexpr (n == 1) {
      recent[0] += ((term[0] + term[1]) + (term[2] + term[3])) + ((term[4] + term[5]) + (term[6] + term[7]));
    } else {
      FASTBN_UNROLL
      for (int i = 0; i < n; ++i) recent[i] += term[i];
    }
  }

  FASTBN_DEVICE void promote() {
    FASTBN_KEEP_LOOP
    for (int i = 0; i < n; ++i) total[i * most_threads] += double(pick(recent, i));
    FASTBN_UNROLL
    for (int i = 0; i < n; ++i) recent[i] = 0;
  }

  FASTBN_DEVICE double promoted(int i) const { return total[i * most_threads]; }
};

// Where a reducing pass keeps the totals of its two sums, and what lies behind them for everything else.
template <int channels>
struct ReduceMemory {
  double* first = device::shared_memory<double>();
  double* second = first + channels * most_threads;
  double* scratch = second + channels * most_threads;
};

// Merges the values of all threads with the same thread_index() % lanes; threads below `lanes` get the result. lanes is
// a power of two up to 32, and the shared scratch holds `lanes` values a warp.
template <class V, class Merge>
FASTBN_DEVICE V merge_block(V value, int lanes, void* scratch, Merge merge) {
  V* shared = static_cast<V*>(scratch);
  const int thread = device::thread_index();
  const int lane = thread % device::kWarp;
  for (int delta = device::kWarp / 2; delta >= lanes; delta /= 2) {
    value = merge(value, device::shuffle_down(value, delta));
  }
  if (lane < lanes) shared[thread / device::kWarp * lanes + lane] = value;
  device::sync_block();
  if (thread < lanes) {
    for (int i = thread + lanes; i < device::block_threads() / device::kWarp * lanes; i += lanes) {
      value = merge(value, shared[i]);
    }
  }
  device::sync_block();  // the next merge writes where this one reads
  return value;
}

// Merges partials[split * channels + channel] over all splits by one warp; its lane 0 gets the result.
template <class V, class Merge>
FASTBN_DEVICE V merge_splits(const V* partials, int64_t splits, int64_t channels, int64_t channel, Merge merge) {
  V value = {};
  for (int64_t split = device::thread_index() % device::kWarp; split < splits; split += device::kWarp) {
    value = merge(value, partials[split * channels + channel]);
  }
  for (int delta = device::kWarp / 2; delta >= 1; delta /= 2) {
    value = merge(value, device::shuffle_down(value, delta));
  }
  return value;
}

// Whether a condition holds in all threads of the first warp; the whole block learns it.
FASTBN_DEVICE bool first_warp_agrees(bool condition, void* scratch) {
  uint32_t* shared = static_cast<uint32_t*>(scratch);
  const uint32_t denied = device::ballot(!condition);
  if (device::thread_index() == 0) *shared = denied;
  device::sync_block();
  const bool agreed = *shared == 0;
  device::sync_block();
  return agreed;
}

}  // namespace fastbn::cuda
