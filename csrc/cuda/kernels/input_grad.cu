// The gradients of the elements: the last pass of two-phase plans, and the only one where no sums are wanted.
#include "cuda/block/coefficients.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/element/input_grad.cuh"
#include "cuda/kernels/passes.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, (blocks_per_sm<T, Walk>(Pass::input_grad)))
    input_grad_kernel(BackwardParams params, Plan plan) {
  using A = acc_t<T>;
  constexpr int channels = Walk::channels;
  const Walk walk = walk_of_block<Walk>(params.layout, plan, Order::reversed);
  const bool frozen = !params.sum_grad;  // or only grad_residual is wanted
  const GradZ<T, Walk::aligned> grad_z(params, plan, params.grad_input && !frozen);
  const InputGradMap<A> map(plan);
  void* const memory = device::shared_memory<char>();
  const bool is_far = !frozen && any_is_far<A>(params, walk, map.votes.in(memory));
  const InputGrad<T, Walk::aligned> input_grad(params, plan, frozen, is_far);

  GradCoefficients<A> coefficients[channels];
  share_coefficients_after_wait(
      walk, map.coefficients.in(memory), [&](int64_t channel) { return channel_of_grads(params, channel); },
      [&](int64_t channel, const ChannelOfGrads& prepared) {
        const double count = params.count ? *params.count : double(params.layout.count());
        return frozen ? grad_coefficients<A>(prepared, 0, 0, 1, false)
                      : grad_coefficients<A>(prepared, params.sum_grad[channel], params.sum_grad_xhat[channel], count,
                                             is_far);
      },
      coefficients);

  grad_z.dispatch_epilogue([&](auto light_epilogue) {
    for_each_vector<light_epilogue.value ? vectors_in_flight<GradZ<T, Walk::aligned>::bytes_in_flight> : 1>(
        walk, [&](const Step& step) { return grad_z.load(step); },
        [&](const Step& step, const auto& item) {
          input_grad.template operator()<light_epilogue.value>(step, grad_z, item, coefficients);
        });
  });
}

}  // namespace

cudaError_t launch_input_grad(const BackwardParams& params, const Plan& plan, bool finished, cudaStream_t stream) {
  const Plan last = last_pass_of(plan, params.layout);
  return dispatch(params.dtype, params.layout, last, [&]<class T, class Walk>() {
    return device::launch(&input_grad_kernel<T, Walk>, last_shape(last, InputGradMap<acc_t<T>>(last).bytes(), finished),
                          stream, params, last);
  });
}

}  // namespace fastbn::cuda
