// The sums that the statistics of a channel come from, of d and d * d about a pivot, and what becomes of them. The
// pivot is an element of the channel, the same to all threads and blocks, so that parts of the sums add up. Where float
// sums overflow, vanish, or meet inf or NaN, the block starts again in double.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/octet.cuh"
#include "cuda/block/reduce.cuh"
#include "cuda/block/walk.cuh"
#include "math/moments.h"
#include "math/params.h"

namespace fastbn::cuda {

// The median of five elements of a channel, spread over it and off its ends: an outlier only where three of them are.
// One that is inf or NaN counts as 0, for about it every sum would be NaN.
FASTBN_DEVICE double pivot_of(const ForwardParams& params, int64_t channel) {
  constexpr int samples = 5;
  const Layout& layout = params.layout;
  if (layout.numel() == 0) return 0;
  const ChannelVector input{const_cast<void*>(params.input), params.dtype};
  double x[samples];
  FASTBN_UNROLL
  for (int i = 0; i < samples; ++i) {
    const int64_t outer = layout.outer * (2 * i + 1) / (2 * samples),
                  inner = layout.inner * (2 * i + 1) / (2 * samples);
    const double value = input.load((outer * layout.channels + channel) * layout.inner + inner);
    x[i] = value - value == 0 ? value : 0;
  }
  const auto least = [](double a, double b) { return a < b ? a : b; };
  const auto most = [](double a, double b) { return a < b ? b : a; };
  const double low = most(least(x[0], x[1]), least(x[2], x[3])), high = least(most(x[0], x[1]), most(x[2], x[3]));
  return most(least(low, high), least(most(low, high), x[4]));
}

FASTBN_DEVICE Moments moments_of(const Layout& layout, double pivot, const Sums& sums) {
  return layout.count() > 0 ? Moments::from_shifted(double(layout.count()), pivot, sums.first, sums.second) : Moments{};
}

// Sums in A the octets for which each(use) calls use(step, x), once each. keep(channel, sums) is called by one thread
// for each channel of the slice. Returns whether float32 was enough for all.
template <class T, class A, class Walk, class Each, class Keep>
FASTBN_DEVICE bool sum_moments(const Walk& walk, ReduceMemory<Walk::channels>& memory,
                               const acc_t<T> (&pivot)[Walk::channels], Each each, Keep keep) {
  sum_octets<T, A>(memory, each, [&](const Step& step, const auto& x, A(&sum)[octet], A(&squares)[octet]) {
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      const A d = Walk::whole || i < step.count ? A(x[i]) - A(pivot[i % Walk::channels]) : A(0);
      sum[i] += d;
      squares[i] += d * d;
    }
  });
  bool resolved = true;
  reduce_totals(walk, memory, [&](int channel, const Sums& sums) {
    keep(channel, sums);
    resolved = resolved && resolves(sums, sums.first == 0);
  });
  return block_agrees(resolved, memory.votes);
}

// Over a block's share, by each(use), and in float64, by each_again(use), where float32 is not enough.
template <class T, class Walk, class Each, class EachAgain, class Keep>
FASTBN_DEVICE void block_moments(const Walk& walk, ReduceMemory<Walk::channels>& memory,
                                 const acc_t<T> (&pivot)[Walk::channels], Each each, EachAgain each_again, Keep keep) {
  using A = acc_t<T>;
  const bool resolved = sum_moments<T, A>(walk, memory, pivot, each, keep);
  if constexpr (sizeof(A) < sizeof(double)) {
    if (!resolved) sum_moments<T, double>(walk, memory, pivot, each_again, keep);
  }
}

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
