// The statistics of a channel. Each thread sums d and d*d about the first element it meets, so that nothing cancels;
// the sums become float64 moments that merge by Chan's formula over the block and then over the splits. Where float
// sums overflow, or meet inf or NaN, the block starts again in double.
#include "cuda/loop.cuh"
#include "cuda/octet.cuh"
#include "cuda/passes.cuh"
#include "cuda/reduce.cuh"

namespace fastbn::cuda {
namespace {

struct MergeMoments {
  FASTBN_DEVICE Moments operator()(const Moments& a, const Moments& b) const { return merge(a, b); }
};

// Sums in A, and returns whether all of the block's channels came out finite.
template <class T, class Walk, class A>
FASTBN_DEVICE bool block_moments(const ForwardParams& params, const Plan& plan, Moments* partials) {
  constexpr int channels = Walk::channels;
  const T* input = static_cast<const T*>(params.input);
  const Walk walk(params.layout, plan, Order::ascending);

  A pivot[channels];
  const Step first = walk.step();
  FASTBN_UNROLL
  for (int i = 0; i < channels; ++i) {
    const A value = i < first.count ? A(to_acc(input[first.offset + i])) : A(0);
    pivot[i] = value - value == 0 ? value : A(0);  // about an infinite pivot every sum would be NaN
  }

  const ReduceMemory<channels> memory;
  LongSum<A, channels> sum(memory.first), squares(memory.second);
  int64_t elements = 0;  // a channel
  int octets = 0;
  for_each_octet(
      walk, [&](const Step& step) { return load_octet(input + step.offset, step.count, plan.vectorized); },
      [&](const Step& step, const Octet<T>& x) {
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
      partials[walk.split * params.layout.channels + walk.channel + i] = moments;
      finite = finite && moments.is_finite();
    }
  }
  return first_warp_agrees(finite, memory.scratch);
}

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, Walk::by_rows && sizeof(T) == sizeof(float) ? 2 : least_blocks)
    moments_kernel(ForwardParams params, Plan plan, Moments* partials) {
  using A = acc_t<T>;
  if (params.num_batches_tracked && device::block_x() == 0 && device::block_y() == 0 && device::thread_index() == 0) {
    ++*params.num_batches_tracked;
  }
  const bool finite = block_moments<T, Walk, A>(params, plan, partials);
  if constexpr (sizeof(A) < sizeof(double)) {
    if (!finite) block_moments<T, Walk, double>(params, plan, partials);
  }
}

FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads)
    finish_moments_kernel(ForwardParams params, int64_t splits, const Moments* partials) {
  const int64_t channels = params.layout.channels;
  const int64_t channel = finish_channel();
  if (channel >= channels) return;
  const Moments moments = merge_splits(partials, splits, channels, channel, MergeMoments());
  if (device::thread_index() % device::kWarp != 0) return;

  const bool empty = moments.count == 0;
  const double var = empty ? 0 : moments.var();
  if (params.mean) params.mean[channel] = moments.mean;
  if (params.var) params.var[channel] = var;
  if (params.inv_std) params.inv_std[channel] = inv_std_of(var, params.eps);
  if (empty) return;

  const int64_t batches = params.num_batches_tracked ? *params.num_batches_tracked : 0;
  const double factor = averaging_factor(params.has_momentum, params.momentum, batches);
  const auto update = [&](const ChannelVector& running, double batch) {
    if (running.defined()) running.store(channel, running_average(running.load(channel), batch, factor));
  };
  update(params.running_mean, moments.mean);
  update(params.running_var, moments.unbiased_var());
}

}  // namespace

cudaError_t launch_moments(const ForwardParams& params, const Plan& plan, Moments* partials, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    const device::Launch shape = pass_shape(plan, ReduceMemory<Walk::channels>::bytes, 0, sizeof(Moments));
    return device::launch(&moments_kernel<T, Walk>, shape, stream, params, plan, partials);
  });
}

cudaError_t launch_finish_moments(const ForwardParams& params, const Plan& plan, const Moments* partials,
                                  cudaStream_t stream) {
  return device::launch(&finish_moments_kernel, finish_shape(params.layout), stream, params, plan.splits, partials);
}

}  // namespace fastbn::cuda
