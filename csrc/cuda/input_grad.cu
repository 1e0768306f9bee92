// grad_input = (grad_z - mean(grad_z) - xhat * mean(grad_z * xhat)) * weight * inv_std, or only
// grad_z * weight * inv_std where the statistics are frozen; grad_residual = grad_z.
#include "cuda/grad_z.cuh"
#include "cuda/passes.cuh"

namespace fastbn::cuda {
namespace {

template <class A>
struct Coefficients {
  Affine<A> affine;
  GradAffine<A> grad;
};

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads) input_grad_kernel(BackwardParams params, Plan plan) {
  using A = acc_t<T>;
  constexpr int channels = Walk::channels;
  T* grad_input = static_cast<T*>(params.grad_input);
  T* grad_residual = static_cast<T*>(params.grad_residual);
  const Walk walk(params.layout, plan, Order::reversed);
  const bool frozen = !params.sum_grad;  // or only grad_residual is wanted
  const GradZ<T> grad_z(params, plan, grad_input && !frozen);

  Coefficients<A> both[channels];
  share_coefficients(
      walk, params.layout.channels, device::shared_memory<char>(),
      [&](int64_t channel) {
        const double count = params.count ? *params.count : double(params.layout.count());
        return Coefficients<A>{
            affine_of<A>(params, channel),
            GradAffine<A>::make(params.mean[channel], params.inv_std[channel], params.weight.load_or(channel, 1),
                                frozen ? 0 : params.sum_grad[channel], frozen ? 0 : params.sum_grad_xhat[channel],
                                frozen ? 1 : count)};
      },
      both);
  Affine<A> affine[channels];
  FASTBN_UNROLL
  for (int i = 0; i < channels; ++i) affine[i] = both[i].affine;

  for_each_octet(
      walk, [&](const Step& step) { return grad_z.load(step); },
      [&](const Step& step, const auto& item) {
        A grad[octet];
        grad_z.compute(item, affine, grad);
        if (grad_residual) store_octet(grad_residual + step.offset, step.count, plan.vectorized, grad);
        if (!grad_input) return;
        FASTBN_UNROLL
        for (int i = 0; i < octet; ++i) {
          const GradAffine<A>& g = both[i % channels].grad;
          grad[i] = frozen ? grad[i] * g.scale : g.apply(grad[i], item.x[i]);
        }
        store_octet(grad_input + step.offset, step.count, plan.vectorized, grad);
      });
}

}  // namespace

cudaError_t launch_input_grad(const BackwardParams& params, const Plan& plan, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    const device::Launch shape = pass_shape(plan, 0, sizeof(Coefficients<acc_t<T>>), 0);
    return device::launch(&input_grad_kernel<T, Walk>, shape, stream, params, plan);
  });
}

}  // namespace fastbn::cuda
