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
  uint32_t* votes = reinterpret_cast<uint32_t*>(second + channels * most_threads);
  void* scratch = votes + most_threads / device::kWarp;
};

// Two totals of each of the thread's channels over the octets for which each(use) calls use(step, item, number);
// terms(step, item, first, second) says what an octet adds.
template <class A, int channels, class Each, class Terms>
FASTBN_DEVICE void sum_octets(const ReduceMemory<channels>& memory, Each each, Terms terms) {
  LongSum<A, channels> first(memory.first), second(memory.second);
  int octets = 0;
  each([&](const Step& step, const auto& item, int) {
    A to_first[octet], to_second[octet];
    terms(step, item, to_first, to_second);
    first.add(to_first);
    second.add(to_second);
    if (++octets == octets_a_promotion) {
      octets = 0;
      first.promote();
      second.promote();
    }
  });
  first.promote();
  second.promote();
}

// Calls work(channel, lane, team, exists) in all threads, so that it may shuffle: `team` neighbouring lanes, a power of
// two, share a channel. Where there are more teams than channels the last channel comes again, and exists is false.
template <class Work>
FASTBN_DEVICE void by_teams(int channels, Work work) {
  const int thread = device::thread_index(), threads = device::block_threads();
  int team = device::kWarp;
  while (team > 1 && team * channels > threads) team /= 2;
  for (int first = 0; first < channels; first += threads / team) {
    const int channel = first + thread / team;
    const bool exists = channel < channels;
    work(exists ? channel : channels - 1, thread % team, team, exists);
  }
}

// Adds up the totals of all threads; keep(channel, first, second) is called by one thread a channel of the slice.
template <class Walk, class Keep>
FASTBN_DEVICE void reduce_totals(const Walk& walk, const ReduceMemory<Walk::channels>& memory, Keep keep) {
  device::sync_block();
  by_teams(walk.slice_channels, [&](int channel, int lane, int team, bool exists) {
    double first = 0, second = 0;
    walk.for_each_sum_of(channel, lane, team, [&](int thread, int i) {
      first += memory.first[i * most_threads + thread];
      second += memory.second[i * most_threads + thread];
    });
    for (int delta = team / 2; delta > 0; delta /= 2) {
      first += device::shuffle_xor(first, delta);
      second += device::shuffle_xor(second, delta);
    }
    if (exists && lane == 0) keep(channel, first, second);
  });
}

// The sum over load(k) for k < count, by the lanes of a team, which all get it. A Sum is about a part, adds parts and
// joins other Sums about the same one.
template <class Sum, class Load>
FASTBN_DEVICE auto merge_parts(int count, int lane, int team, Load load) {
  Sum sum = Sum::about(load(0));
  for (int k = lane; k < count; k += team) sum.add(load(k));
  for (int delta = team / 2; delta > 0; delta /= 2) sum.join(device::shuffle_xor(sum, delta));
  return sum.result();
}

// Whether a condition holds in all threads of the block, which all learn it. All are then behind what they did before.
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
