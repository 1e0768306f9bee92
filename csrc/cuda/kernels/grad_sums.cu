// The sums of the gradients in two-phase plans: partial sums per block, added up over the splits. With frozen
// statistics the gradients of the elements do not depend on the sums, and are made in the same pass.
#include "cuda/block/coefficients.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/element/grad_sums.cuh"
#include "cuda/element/input_grad.cuh"
#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/passes.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, (blocks_per_sm<T, Walk>(Pass::grad_sums)))
    grad_sums_kernel(BackwardParams params, Plan plan, Sums* partials) {
  using A = acc_t<T>;
  auto& memory = reduce_memory<Walk::channels>();
  const ReduceMap map(plan, Walk::channels);
  auto* const scratch = map.template scratch_in<SumCoefficients<T>>(&memory);
  const Walk walk = walk_of_block<Walk>(params.layout, plan, Order::ascending);
  const GradZ<T, Walk::aligned> grad_z(params, plan, params.sum_grad_xhat || params.grad_weight.defined());
  const InputGrad<T, Walk::aligned> input_grad(params, plan, true, false);
  SumCoefficients<T> coefficients[Walk::channels];
  share_coefficients(
      walk, scratch, [&](int64_t channel) { return sum_coefficients<T>(params, channel); }, coefficients);
  block_grad_sums(
      walk, memory, grad_z, scratch, coefficients,
      [&](auto light_epilogue, auto use) {
        constexpr int batch = light_epilogue.value ? vectors_in_flight<GradZ<T, Walk::aligned>::bytes_in_flight> : 1;
        for_each_vector<batch>(walk, [&](const Step& step) { return grad_z.load(step); }, use);
        device::allow_next_launch();
      },
      [&](const Step& step, const A(&grad)[vec_size]) {
        if (params.statistics == Statistics::running) input_grad.store_frozen(step, grad, coefficients);
      },
      [&](int channel, const Sums& sums) {
        partials[walk.split * params.layout.channels + walk.first_channel + channel] = sums;
      });
}

struct FinishGradSums {
  FASTBN_DEVICE FinishGradSums(const BackwardParams&, int64_t) {}

  FASTBN_DEVICE void operator()(const BackwardParams& params, int64_t channel, const Sums& sums) const {
    save_grad_sums(params, channel, sums.first, sum_grad_xhat(params, channel, sums));
  }
};

}  // namespace

cudaError_t launch_grad_sums(const BackwardParams& params, const Plan& plan, Sums* partials, cudaStream_t stream) {
  return dispatch(params.dtype, params.layout, plan, [&]<class T, class Walk>() {
    return device::launch(&grad_sums_kernel<T, Walk>, reduce_shape(plan), stream, params, plan, partials);
  });
}

cudaError_t launch_finish_grad_sums(const BackwardParams& params, const Plan& plan, const Sums* partials,
                                    cudaStream_t stream) {
  return launch_finish<FinishGradSums>(params, plan, partials, stream);
}

}  // namespace fastbn::cuda
