// Reductions in a fixed order: vectors into accumulators, threads over a block, splits over a warp.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/walk.cuh"
#include "cuda/device/device.cuh"
#include "math/sums.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"

namespace fastbn::cuda {

// Vectors between promotions of the fp32 accumulators to double, which bound their error however large the tensor.
// Elements of half types are rounded so much more than their sums that promotions can be rarer. Sums of float64 are cut
// as often as those of float32: a long chain of additions would show in results that are held to 4 ulp.
template <class T>
constexpr int vectors_per_promotion = sizeof(T) < sizeof(float) ? 64 : 8;

// n sums per thread (1 or 8), kept in eight accumulators of type A to break the dependency chain. Every
// vectors_per_promotion vectors they are added to a float64 total in shared memory: in registers the totals would halve
// the occupancy.
template <class A, int n>
struct LongSum {
  static_assert(n == 1 || n == vec_size);
  A recent[vec_size] = {};
  double* total;

  FASTBN_DEVICE explicit LongSum(double (&totals)[n][max_threads]) : total(&totals[0][device::thread_index()]) {
    FASTBN_UNROLL
    for (int i = 0; i < n; ++i) total[i * max_threads] = 0;
  }

  FASTBN_DEVICE void promote() {
    if constexpr (n == 1) {
      const auto& r = recent;
      total[0] += double(((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7])));
    } else {
      constexpr int part = vec_size / 2;
      FASTBN_KEEP_LOOP
      for (int first = 0; first < n; first += part) {
        FASTBN_UNROLL
        for (int i = 0; i < part; ++i) total[(first + i) * max_threads] += double(pick<part>(recent, first, i));
      }
    }
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) recent[i] = 0;
  }
};

// Returns the first part of the block's shared memory.
template <int channels>
FASTBN_DEVICE ReduceMemory<channels>& reduce_memory() {
  return *device::shared_memory<ReduceMemory<channels>>();
}

// Sums over the vectors for which each(use) calls use(step, item), into two totals per thread and channel.
// add(step, item, first, second) adds a vector to the accumulators.
template <class T, class A, int channels, class Each, class Add>
FASTBN_DEVICE void sum_vectors(ReduceMemory<channels>& memory, Each each, Add add) {
  LongSum<A, channels> first(memory.first), second(memory.second);
  int vectors = 0;
  each([&](const Step& step, const auto& item) {
    add(step, item, first.recent, second.recent);
    if (++vectors == vectors_per_promotion<T>) {
      vectors = 0;
      first.promote();
      second.promote();
    }
  });
  first.promote();
  second.promote();
}

// Calls work(channel, lane, bits, exists) in all lanes of warps that have a channel, so that it may shuffle. 2^bits
// neighbouring lanes share a channel. Teams without one get the last one again, and `exists` is false.
template <class Work>
FASTBN_DEVICE void by_teams(int channels, Work work) {
  const int thread = device::thread_index(), threads = device::block_threads();
  int bits = 5;
  while (bits > 0 && channels << bits > threads) --bits;
  const int lane = thread & ((1 << bits) - 1), first_of_warp = (thread & -device::kWarp) >> bits;
  for (int first = 0; first + first_of_warp < channels; first += threads >> bits) {
    const int channel = first + (thread >> bits);
    const bool exists = channel < channels;
    work(exists ? channel : channels - 1, lane, bits, exists);
  }
}

// Returns whether float32 sums of squares or products are as good as float64 ones: no sum overflowed, and no sum of
// nonzero numbers underflowed. `is_exact_zero` says that a second sum of 0 is right.
FASTBN_DEVICE bool resolves(const Sums& sums, bool is_exact_zero) {
  const bool finite = sums.first - sums.first == 0 && sums.second - sums.second == 0;
  return finite && (sums.second >= 1e-30 || sums.second <= -1e-30 || (sums.second == 0 && is_exact_zero));
}

// Adds up the totals of the threads that have the same element of a row, a warp per element, until those of the first
// `parts` threads are left. A thread without vectors has totals of 0.
FASTBN_DEVICE void add_rows(ReduceMemory<vec_size>& memory, int parts) {
  const int thread = device::thread_index(), threads = device::block_threads();
  for (int i = thread / device::kWarp; i < vec_size; i += threads / device::kWarp) {
    for (int part = thread % device::kWarp; part < parts; part += device::kWarp) {
      double first = memory.first[i][part], second = memory.second[i][part];
      for (int other = part + parts; other < threads; other += parts) {
        first += memory.first[i][other];
        second += memory.second[i][other];
      }
      memory.first[i][part] = first;
      memory.second[i][part] = second;
    }
  }
}

// Adds up the totals of all threads, without a division. One thread per channel of the tile calls save(channel, sums).
template <class Walk, class Save>
FASTBN_DEVICE void reduce_totals(const Walk& walk, ReduceMemory<Walk::channels>& memory, Save save) {
  device::sync_block();
  int parts = device::block_threads();
  if constexpr (Walk::by_rows) {
    parts = walk.parts();
    add_rows(memory, parts);
    device::sync_block();
  }
  by_teams(walk.tile_channels, [&](int channel, int lane, int bits, bool exists) {
    double first = 0, second = 0;
    walk.for_each_sum_of(channel, lane, bits, parts, [&](int thread, int i) {
      first += memory.first[i][thread];
      second += memory.second[i][thread];
    });
    for (int delta = (1 << bits) >> 1; delta > 0; delta >>= 1) {
      first += device::shuffle_xor(first, delta);
      second += device::shuffle_xor(second, delta);
    }
    if (exists && lane == 0) save(channel, Sums{first, second});
  });
}

// Returns the sum of load(k) for k < count, in all lanes of a team, which share the work. Several loads are in flight
// at a time.
template <class Load>
FASTBN_DEVICE Sums merge_parts(int count, int lane, int team, Load load) {
  constexpr int batch = 4;
  Sums sums;
  int k = lane;
  FASTBN_KEEP_LOOP
  for (; k + (batch - 1) * team < count; k += batch * team) {
    Sums parts[batch];
    FASTBN_UNROLL
    for (int i = 0; i < batch; ++i) parts[i] = load(k + i * team);
    FASTBN_UNROLL
    for (int i = 0; i < batch; ++i) sums.add(parts[i]);
  }
  FASTBN_KEEP_LOOP
  for (; k < count; k += team) sums.add(load(k));
  for (int delta = team / 2; delta > 0; delta /= 2) sums.add(device::shuffle_xor(sums, delta));
  return sums;
}

// Returns, in every thread of the block, whether `condition` holds in all of them. It is also a barrier.
FASTBN_DEVICE bool block_agrees(bool condition, uint32_t* votes) {
  const int thread = device::thread_index();
  const uint32_t denied = device::ballot(!condition);
  if (thread % device::kWarp == 0) votes[thread / device::kWarp] = denied;
  device::sync_block();
  uint32_t any = 0;
  for (int warp = 0; warp < device::block_threads() / device::kWarp; ++warp) any |= votes[warp];
  return any == 0;
}

}  // namespace fastbn::cuda
