// The statistics of a block's share of its channels, and what becomes of a channel's once they are merged. Each thread
// sums d and d*d about the first element it meets, so that nothing cancels; the sums become float64 moments that merge
// by Chan's formula. Where float sums overflow, or meet inf or NaN, the block starts again in double.
#pragma once

#include "cuda/loop.cuh"
#include "cuda/octet.cuh"
#include "cuda/reduce.cuh"
#include "cuda/walk.cuh"
#include "math/moments.h"
#include "math/params.h"

namespace fastbn::cuda {

struct MergeMoments {
  FASTBN_DEVICE Moments operator()(const Moments& a, const Moments& b) const { return merge(a, b); }
};

// Sums in A the octets that load(step, number) gives; keep(i, moments) is called in threads below `lanes` for the i-th
// of their channels. Returns whether all came out finite.
template <class A, class Walk, class Load, class Keep>
FASTBN_DEVICE bool sum_moments(const Walk& walk, const ReduceMemory<Walk::channels>& memory, Load load, Keep keep) {
  constexpr int channels = Walk::channels;
  A pivot[channels] = {};
  const Step first = walk.step();
  if (first.count > 0) {
    const auto x = load(first, 0);
    FASTBN_UNROLL
    for (int i = 0; i < channels; ++i) {
      const A value = i < first.count ? A(x[i]) : A(0);
      pivot[i] = value - value == 0 ? value : A(0);  // about an infinite pivot every sum would be NaN
    }
  }

  LongSum<A, channels> sum(memory.first), squares(memory.second);
  int64_t elements = 0;  // a channel
  int octets = 0;
  for_each_octet(walk, load, [&](const Step& step, const auto& x) {
    A d[octet], d_squared[octet];
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      d[i] = i < step.count ? A(x[i]) - pivot[i % channels] : A(0);
      d_squared[i] = d[i] * d[i];
    }
    sum.add(d);
    squares.add(d_squared);
    elements += channels == 1 ? step.count : 1;
    if (++octets == octets_a_promotion) {
      octets = 0;
      sum.promote();
      squares.promote();
    }
  });
  sum.promote();
  squares.promote();

  bool finite = true;
  FASTBN_KEEP_LOOP
  for (int i = 0; i < channels; ++i) {
    Moments moments;
    if (elements > 0) {
      moments = Moments::from_shifted(double(elements), double(pick(pivot, i)), sum.promoted(i), squares.promoted(i));
    }
    moments = merge_block(moments, walk.lanes, memory.scratch, MergeMoments());
    if (device::thread_index() < walk.lanes && i < walk.live) {
      keep(i, moments);
      finite = finite && moments.is_finite();
    }
  }
  return first_warp_agrees(finite, memory.scratch);
}

// The same in float32, and again in float64 where that is not enough.
template <class T, class Walk, class Load, class Keep>
FASTBN_DEVICE void block_moments(const Walk& walk, const ReduceMemory<Walk::channels>& memory, Load load, Keep keep) {
  const bool finite = sum_moments<acc_t<T>>(walk, memory, load, keep);
  if constexpr (sizeof(acc_t<T>) < sizeof(double)) {
    if (!finite) sum_moments<double>(walk, memory, load, keep);
  }
}

// num_batches_tracked in a launch of many blocks. With a momentum nobody needs its value, and one thread increments it.
// Without one, every block needs the value from before: each adds itself to the upper half of the counter when it has
// read the lower one, and the last to do so leaves the number of batches, one more.
class Batches {
 public:
  FASTBN_DEVICE explicit Batches(const ForwardParams& params)
      : counter_(params.num_batches_tracked), read_by_all_(!params.has_momentum) {}

  // This batch counted.
  FASTBN_DEVICE int64_t number() const { return counter_ && read_by_all_ ? (*counter_ & lower_half) + 1 : 0; }

  // To be called by all threads, when all of the block are behind number() and a barrier.
  FASTBN_DEVICE void count() const {
    if (!counter_ || device::thread_index() != 0) return;
    if (!read_by_all_) {
      if (device::block_x() == 0 && device::block_y() == 0) ++*counter_;
      return;
    }
    const int64_t before = device::atomic_add(counter_, upper_one);
    if (before / upper_one + 1 == device::grid_x() * device::grid_y()) *counter_ = (before & lower_half) + 1;
  }

 private:
  static constexpr int64_t upper_one = int64_t(1) << 32, lower_half = upper_one - 1;
  int64_t* counter_;
  bool read_by_all_;
};

// Writes the statistics of a channel that are wanted and moves the running ones; `batches` counts this one too.
FASTBN_DEVICE void save_statistics(const ForwardParams& params, int64_t channel, const Moments& moments,
                                   int64_t batches) {
  const bool empty = moments.count == 0;
  const double var = empty ? 0 : moments.var();
  if (params.mean) params.mean[channel] = moments.mean;
  if (params.var) params.var[channel] = var;
  if (params.inv_std) params.inv_std[channel] = inv_std_of(var, params.eps);
  if (empty) return;

  const double factor = averaging_factor(params.has_momentum, params.momentum, batches);
  const auto update = [&](const ChannelVector& running, double batch) {
    if (running.defined()) running.store(channel, running_average(running.load(channel), batch, factor));
  };
  update(params.running_mean, moments.mean);
  update(params.running_var, moments.unbiased_var());
}

}  // namespace fastbn::cuda
