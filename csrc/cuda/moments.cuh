// The statistics of a block's share of its channels, and what becomes of a channel's once they are merged. Each thread
// sums d and d*d about the first element it meets, so that nothing cancels in float32. In float64, where an element of
// the channel is as good a pivot as another, its sums move to the block's pivot and add up without a division; blocks
// likewise. Where float sums overflow, or meet inf or NaN, the block starts again in double.
#pragma once

#include "cuda/loop.cuh"
#include "cuda/octet.cuh"
#include "cuda/reduce.cuh"
#include "cuda/walk.cuh"
#include "math/moments.h"
#include "math/params.h"

namespace fastbn::cuda {

// Sums in A the octets that load(step, number) gives, once each; peek(step) gives the first one beforehand.
// keep(channel, moments) is called by one thread for each channel of the slice. Returns whether all came out finite.
template <class A, class Walk, class Peek, class Load, class Keep>
FASTBN_DEVICE bool sum_moments(const Layout& layout, const Plan& plan, const Walk& walk,
                               const ReduceMemory<Walk::channels>& memory, Peek peek, Load load, Keep keep) {
  constexpr int channels = Walk::channels;
  A pivot[channels] = {};
  const Step first = walk.step();
  if (first.count > 0) {
    const auto x = peek(first);
    FASTBN_UNROLL
    for (int i = 0; i < channels; ++i) {
      const A value = i < first.count ? A(x[i]) : A(0);
      pivot[i] = value - value == 0 ? value : A(0);  // about an infinite pivot every sum would be NaN
    }
  }

  int64_t elements = 0;  // of each of the thread's channels, but that its last octet may have fewer
  int last = 0;
  const auto each = [&](auto use) { for_each_octet(walk, load, use); };
  sum_octets<A>(memory, each, [&](const Step& step, const auto& x, A(&d)[octet], A(&d_squared)[octet]) {
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      d[i] = i < step.count ? A(x[i]) - pivot[i % channels] : A(0);
      d_squared[i] = d[i] * d[i];
    }
    elements += channels == 1 ? step.count : 1;
    last = step.count;
  });

  // The median of three is an outlier only where two are.
  double* const pivots = static_cast<double*>(memory.scratch);
  for (int n = 0; n < Walk::witnesses; ++n) {
    if (!walk.is_witness(n)) continue;
    walk.for_each_channel([&](int i, int channel, bool is_first) {
      if (is_first) pivots[Walk::witnesses * channel + n] = double(pivot[i]);
    });
  }
  const auto block_pivot = [&](int channel) {
    const double* const p = pivots + Walk::witnesses * channel;
    const double a = p[0], b = p[1], c = p[2];
    const double low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c < high ? c : high;
  };
  device::sync_block();
  if (elements > 0) {
    walk.for_each_channel([&](int i, int channel, bool) {
      double& sum = memory.first[i * most_threads + device::thread_index()];
      double& squares = memory.second[i * most_threads + device::thread_index()];
      const double moved = double(pivot[i]) - block_pivot(channel);
      const double count = double(elements - (channels > 1 && i >= last));
      squares += moved * (2 * sum + count * moved);
      sum += count * moved;
    });
  }

  bool finite = true;
  reduce_totals(walk, memory, [&](int channel, double sum, double squares) {
    const double count = double(elements_of(plan, layout, walk.split));
    Moments moments;
    if (count > 0) moments = Moments::from_shifted(count, block_pivot(channel), sum, squares);
    keep(channel, moments);
    finite = finite && moments.is_finite();
  });
  return block_agrees(finite, memory.votes);
}

// The same in float32, and in float64, by load_again(step, number), where that is not enough.
template <class T, class Walk, class Peek, class Load, class LoadAgain, class Keep>
FASTBN_DEVICE void block_moments(const Layout& layout, const Plan& plan, const Walk& walk,
                                 const ReduceMemory<Walk::channels>& memory, Peek peek, Load load, LoadAgain load_again,
                                 Keep keep) {
  const bool finite = sum_moments<acc_t<T>>(layout, plan, walk, memory, peek, load, keep);
  if constexpr (sizeof(acc_t<T>) < sizeof(double)) {
    const auto peek_again = [&](const Step& step) { return load_again(step, 0); };
    if (!finite) sum_moments<double>(layout, plan, walk, memory, peek_again, load_again, keep);
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
      if (device::block_x() == 0) ++*counter_;
      return;
    }
    const int64_t before = device::atomic_add(counter_, upper_one);
    if (before / upper_one + 1 == device::grid_x()) *counter_ = (before & lower_half) + 1;
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
