// The sums that the gradients of a channel need: of grad_z, and of grad_z * (x - pivot) about the rounded mean, which
// is corrected to xhat once a channel.
#include "cuda/grad_z.cuh"
#include "cuda/loop.cuh"
#include "cuda/passes.cuh"
#include "cuda/reduce.cuh"

namespace fastbn::cuda {
namespace {

struct AddGradSums {
  FASTBN_DEVICE GradSums operator()(const GradSums& a, const GradSums& b) const {
    return {a.grad + b.grad, a.shifted + b.shifted};
  }
};

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads)
    grad_sums_kernel(BackwardParams params, Plan plan, GradSums* partials) {
  using A = acc_t<T>;
  constexpr int channels = Walk::channels;
  const ReduceMemory<channels> memory;
  const Walk walk(params.layout, plan, Order::ascending);
  const bool needs_x = params.sum_grad_xhat || params.grad_weight.defined();
  const GradZ<T> grad_z(params, plan, needs_x);
  Affine<A> affine[channels];
  share_coefficients(
      walk, params.layout.channels, memory.scratch, [&](int64_t channel) { return affine_of<A>(params, channel); },
      affine);
  device::sync_block();  // the merges below write where the coefficients were

  LongSum<A, channels> sum(memory.first), shifted(memory.second);
  int octets = 0;
  for_each_octet(
      walk, [&](const Step& step) { return grad_z.load(step); },
      [&](const Step& step, const auto& item) {
        A grad[octet], product[octet];
        grad_z.compute(item, affine, grad);
        FASTBN_UNROLL
        for (int i = 0; i < octet; ++i) {
          grad[i] = i < step.count ? grad[i] : A(0);
          product[i] = grad[i] * (item.x[i] - affine[i % channels].pivot);
        }
        sum.add(grad);
        if (needs_x) shifted.add(product);
        if (++octets == octets_a_promotion) {
          octets = 0;
          sum.promote();
          shifted.promote();
        }
      });
  sum.promote();
  shifted.promote();

  FASTBN_KEEP_LOOP
  for (int i = 0; i < channels; ++i) {
    const GradSums own = {sum.promoted(i), shifted.promoted(i)};
    const GradSums merged = merge_block(own, walk.lanes, memory.scratch, AddGradSums());
    if (device::thread_index() < walk.lanes && i < walk.live) {
      partials[walk.split * params.layout.channels + walk.channel + i] = merged;
    }
  }
}

FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads)
    finish_grad_sums_kernel(BackwardParams params, int64_t splits, const GradSums* partials) {
  const int64_t channels = params.layout.channels;
  const int64_t channel = finish_channel();
  if (channel >= channels) return;
  const GradSums sums = merge_splits(partials, splits, channels, channel, AddGradSums());
  if (device::thread_index() % device::kWarp != 0) return;

  const double mean = params.mean[channel];
  const double pivot = params.dtype == DType::float64 ? mean : double(float(mean));
  const double xhat = sum_grad_xhat_of(sums.grad, sums.shifted, pivot, mean, params.inv_std[channel]);
  if (params.sum_grad) params.sum_grad[channel] = sums.grad;
  if (params.sum_grad_xhat) params.sum_grad_xhat[channel] = xhat;
  if (params.grad_bias.defined()) params.grad_bias.store(channel, sums.grad);
  if (params.grad_weight.defined()) params.grad_weight.store(channel, xhat);
}

}  // namespace

cudaError_t launch_grad_sums(const BackwardParams& params, const Plan& plan, GradSums* partials, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    const device::Launch shape =
        pass_shape(plan, ReduceMemory<Walk::channels>::bytes, sizeof(Affine<acc_t<T>>), sizeof(GradSums));
    return device::launch(&grad_sums_kernel<T, Walk>, shape, stream, params, plan, partials);
  });
}

cudaError_t launch_finish_grad_sums(const BackwardParams& params, const Plan& plan, const GradSums* partials,
                                    cudaStream_t stream) {
  return device::launch(&finish_grad_sums_kernel, finish_shape(params.layout), stream, params, plan.splits, partials);
}

}  // namespace fastbn::cuda
