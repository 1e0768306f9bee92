// output = activation((x - mean) * inv_std * weight + bias + residual), with a bit an element for backward where asked.
#include "cuda/activate.cuh"
#include "cuda/octet.cuh"
#include "cuda/passes.cuh"
#include "math/affine.h"

namespace fastbn::cuda {
namespace {

struct Normalizer {
  double mean, inv_std;
};

FASTBN_DEVICE Normalizer normalizer_of(const ForwardParams& params, int64_t channel) {
  if (params.statistics != Statistics::running) return {params.mean[channel], params.inv_std[channel]};
  return {params.running_mean.load(channel), inv_std_of(params.running_var.load(channel), params.eps)};
}

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, Walk::by_rows && sizeof(T) < sizeof(double) ? 3 : least_blocks)
    normalize_kernel(ForwardParams params, Plan plan) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(params.input);
  const T* residual = static_cast<const T*>(params.residual);
  T* output = static_cast<T*>(params.output);
  const Walk walk(params.layout, plan, Order::reversed);

  const bool saves = params.statistics == Statistics::running && walk.split == 0;
  Affine<A> affine[Walk::channels];
  share_coefficients(
      walk, params.layout.channels, device::shared_memory<char>(),
      [&](int64_t channel) {
        const Normalizer n = normalizer_of(params, channel);
        if (saves && params.mean) params.mean[channel] = n.mean;
        if (saves && params.inv_std) params.inv_std[channel] = n.inv_std;
        return Affine<A>::make(n.mean, n.inv_std, params.weight.load_or(channel, 1), params.bias.load_or(channel, 0));
      },
      affine);

  struct Item {
    Octet<T> x, residual;
  };
  for_each_octet(
      walk,
      [&](const Step& step) {
        Item item = {};
        item.x = load_octet(input + step.offset, step.count, plan.vectorized);
        if (residual) item.residual = load_octet(residual + step.offset, step.count, plan.vectorized);
        return item;
      },
      [&](const Step& step, const Item& item) {
        A z[octet];
        FASTBN_UNROLL
        for (int i = 0; i < octet; ++i) z[i] = affine[i % Walk::channels].apply(item.x[i]);
        if (residual) {
          FASTBN_UNROLL
          for (int i = 0; i < octet; ++i) z[i] += item.residual[i];
        }
        if (params.mask) params.mask[step.mask_byte] = mask_of(params.activation, z, step.count);
        activate(params.activation, z);
        store_octet(output + step.offset, step.count, plan.vectorized, z);
      });
}

}  // namespace

cudaError_t launch_normalize(const ForwardParams& params, const Plan& plan, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    return device::launch(&normalize_kernel<T, Walk>, pass_shape(plan, 0, sizeof(Affine<acc_t<T>>), 0), stream, params,
                          plan);
  });
}

}  // namespace fastbn::cuda
