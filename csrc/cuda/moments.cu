// The statistics of all channels by the two-phase plans: partial moments a block, merged over the splits.
#include "cuda/moments.cuh"
#include "cuda/passes.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, !Walk::by_rows               ? 3
                                                      : sizeof(T) == sizeof(float) ? 2
                                                                                   : least_blocks)
    moments_kernel(ForwardParams params, Plan plan, Moments* partials) {
  if (params.num_batches_tracked && device::block_x() == 0 && device::thread_index() == 0) {
    ++*params.num_batches_tracked;
  }
  const T* input = static_cast<const T*>(params.input);
  const Walk walk = walk_of_block<Walk>(params.layout, plan, Order::ascending);
  const auto load = [&](const Step& step, int) { return load_octet(input + step.offset, step.count, plan.vectorized); };
  block_moments<T>(
      params.layout, plan, walk, ReduceMemory<Walk::channels>(), [&](const Step& step) { return load(step, 0); }, load,
      load,
      [&](int channel, const Moments& moments) {
        partials[walk.split * params.layout.channels + walk.slice_channel + channel] = moments;
      });
}

FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads)
    finish_moments_kernel(ForwardParams params, int splits, const Moments* partials) {
  const int64_t channels = params.layout.channels;
  const int64_t channel = finish_channel();
  if (channel >= channels) return;
  const int lane = device::thread_index() % device::kWarp;
  const Moments moments = merge_parts<MomentsSum>(splits, lane, device::kWarp,
                                                  [&](int split) { return partials[split * channels + channel]; });
  if (lane != 0) return;
  save_statistics(params, channel, moments, params.num_batches_tracked ? *params.num_batches_tracked : 0);
}

}  // namespace

cudaError_t launch_moments(const ForwardParams& params, const Plan& plan, Moments* partials, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    return device::launch(&moments_kernel<T, Walk>, sums_shape<T>(plan, false), stream, params, plan, partials);
  });
}

cudaError_t launch_finish_moments(const ForwardParams& params, const Plan& plan, const Moments* partials,
                                  cudaStream_t stream) {
  return device::launch(&finish_moments_kernel, finish_shape(params.layout), stream, params, plan.splits, partials);
}

}  // namespace fastbn::cuda
