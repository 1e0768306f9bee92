// The sums that the statistics of a channel come from, of d and d * d about a pivot, and the statistics. The pivot is
// an element of the channel, the same for all threads and blocks, so that partial sums add up. If float sums
// overflow, underflow, meet inf or NaN, or cancel about a distant pivot, the block starts again in double.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/reduce.cuh"
#include "cuda/block/vec8.cuh"
#include "cuda/block/walk.cuh"
#include "math/moments.h"
#include "math/params.h"
#include "math/pivot.h"

namespace fastbn::cuda {

// Returns the pivot of a channel's sums (pivot.h), 0 for an empty input.
FASTBN_DEVICE double pivot_of(const ForwardParams& params, int64_t channel) {
  const Layout& layout = params.layout;
  if (layout.numel() == 0) return 0;
  const ChannelVector input{const_cast<void*>(params.input), params.dtype};
  double sample[pivot_samples];
  FASTBN_UNROLL
  for (int i = 0; i < pivot_samples; ++i)
    sample[i] = finite_sample(input.load(pivot_sample(layout, i) + channel * layout.inner));
  return median(sample);
}

FASTBN_DEVICE Moments moments_of(const Layout& layout, double pivot, const Sums& sums) {
  return layout.count() > 0 ? Moments::from_shifted(double(layout.count()), pivot, sums.first, sums.second) : Moments{};
}

// Returns whether float32 sums about the pivot leave too few digits of a block's squares: whether the pivot lies more
// than 8 standard deviations from the mean of the block's `count` elements of a channel. If no block's part cancels,
// neither do the sums over all of them. Parts of a few elements may be as narrow by chance, and lose little.
FASTBN_DEVICE bool cancels(const Sums& sums, double count) {
  constexpr double min_count = 32, max_ratio = 64;  // of the squares to those about the mean
  return count >= min_count && (max_ratio - 1) * sums.second * count < max_ratio * sums.first * sums.first;
}

// Sums, in A, over the vectors for which each(use) calls use(step, x). memory.elements_per_channel is set. One thread
// per channel of the tile calls save(channel, sums). Returns whether float32 was enough for all channels.
template <class T, class A, class Walk, class Each, class Save>
FASTBN_DEVICE bool sum_moments(const Walk& walk, ReduceMemory<Walk::channels>& memory,
                               const acc_t<T> (&pivot)[Walk::channels], Each each, Save save) {
  sum_vectors<T, A>(memory, each, [&](const Step& step, const auto& x, A(&sum)[vec_size], A(&squares)[vec_size]) {
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) {
      const A d = Walk::aligned || i < step.count ? A(x[i]) - A(pivot[i % Walk::channels]) : A(0);
      sum[i] += d;
      squares[i] += d * d;
    }
  });
  bool resolved = true;
  reduce_totals(walk, memory, [&](int channel, const Sums& sums) {
    save(channel, sums);
    resolved = resolved && resolves(sums, sums.first == 0) && !cancels(sums, memory.elements_per_channel);
  });
  return block_agrees(resolved, memory.votes);
}

// Sums over the work of a block by each(use), and where float32 is not enough in float64 by each_again(use).
template <class T, class Walk, class Each, class EachAgain, class Save>
FASTBN_DEVICE void block_moments(const Walk& walk, ReduceMemory<Walk::channels>& memory,
                                 const acc_t<T> (&pivot)[Walk::channels], Each each, EachAgain each_again, Save save) {
  using A = acc_t<T>;
  const bool resolved = sum_moments<T, A>(walk, memory, pivot, each, save);
  if constexpr (sizeof(A) < sizeof(double)) {
    if (!resolved) sum_moments<T, double>(walk, memory, pivot, each_again, save);
  }
}

// Writes the statistics of a channel that are wanted, and updates the running ones. `batches` includes this batch.
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
