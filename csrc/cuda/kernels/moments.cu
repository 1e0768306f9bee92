// The statistics of all channels in two-phase plans: partial sums per block, added up over the splits.
#include "cuda/block/coefficients.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/element/moments.cuh"
#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/passes.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, (blocks_per_sm<T, Walk>(Pass::moments)))
    moments_kernel(ForwardParams params, Plan plan, Sums* partials) {
  if (params.num_batches_tracked && device::block_x() == 0 && device::thread_index() == 0) {
    ++*params.num_batches_tracked;
  }
  const T* input = static_cast<const T*>(params.input);
  const Walk walk = walk_of_block<Walk>(params.layout, plan, Order::ascending);
  const auto load = [&](const Step& step) {
    return load_vec<Walk::aligned>(input + step.offset, step.count, plan.vectorized);
  };
  using A = acc_t<T>;
  auto& memory = reduce_memory<Walk::channels>();
  const ReduceMap map(plan, Walk::channels);
  if (device::thread_index() == 0) memory.elements_per_channel = double(walk.elements_per_channel());
  A pivot[Walk::channels];
  share_coefficients(
      walk, map.template scratch_in<A>(&memory), [&](int64_t channel) { return A(pivot_of(params, channel)); }, pivot);
  block_moments<T>(
      walk, memory, pivot,
      [&](auto use) {
        for_each_vector<vectors_in_flight<sizeof(Vec8<T>)>>(walk, load, use);
        device::allow_next_launch();
      },
      [&](auto use) { for_each_vector<1>(walk, load, use); },
      [&](int channel, const Sums& sums) {
        partials[walk.split * params.layout.channels + walk.first_channel + channel] = sums;
      });
}

struct FinishMoments {
  double pivot;

  FASTBN_DEVICE FinishMoments(const ForwardParams& params, int64_t channel) : pivot(pivot_of(params, channel)) {}

  FASTBN_DEVICE void operator()(const ForwardParams& params, int64_t channel, const Sums& sums) const {
    const Moments moments = moments_of(params.layout, pivot, sums);
    save_statistics(params, channel, moments, params.num_batches_tracked ? *params.num_batches_tracked : 0);
  }
};

}  // namespace

cudaError_t launch_moments(const ForwardParams& params, const Plan& plan, Sums* partials, cudaStream_t stream) {
  return dispatch(params.dtype, params.layout, plan, [&]<class T, class Walk>() {
    return device::launch(&moments_kernel<T, Walk>, reduce_shape(plan), stream, params, plan, partials);
  });
}

cudaError_t launch_finish_moments(const ForwardParams& params, const Plan& plan, const Sums* partials,
                                  cudaStream_t stream) {
  return launch_finish<FinishMoments>(params, plan, partials, stream);
}

}  // namespace fastbn::cuda
