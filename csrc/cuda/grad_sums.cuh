// The sums that the gradients of a channel need: of grad_z, and of grad_z * (x - pivot) about the rounded mean, which
// is corrected to xhat once a channel.
#pragma once

#include "cuda/grad_z.cuh"
#include "cuda/reduce.cuh"

namespace fastbn::cuda {

// Merged as MomentsSum is, but that these only add.
struct GradSums {
  double grad = 0;
  double shifted = 0;

  static FASTBN_DEVICE GradSums about(const GradSums&) { return {}; }
  FASTBN_DEVICE void add(const GradSums& part) { *this = {grad + part.grad, shifted + part.shifted}; }
  FASTBN_DEVICE void join(const GradSums& other) { add(other); }
  FASTBN_DEVICE GradSums result() const { return *this; }
};

// Over a block's share. each(use) calls use(step, item, number) for its octets, with items of grad_z; also(step, grad)
// gets what they come to; keep(channel, sums) is called by one thread for each channel of the slice. Where the items
// have no x, `shifted` means nothing.
template <class T, class Walk, class Each, class Also, class Keep>
FASTBN_DEVICE void block_grad_sums(const Walk& walk, const ReduceMemory<Walk::channels>& memory, const GradZ<T>& grad_z,
                                   const Affine<acc_t<T>> (&affine)[Walk::channels], Each each, Also also, Keep keep) {
  using A = acc_t<T>;
  sum_octets<A>(memory, each, [&](const Step& step, const auto& item, A(&grad)[octet], A(&product)[octet]) {
    grad_z.compute(item, affine, grad);
    also(step, grad);
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      grad[i] = i < step.count ? grad[i] : A(0);
      product[i] = grad[i] * (item.x[i] - affine[i % Walk::channels].pivot);
    }
  });
  reduce_totals(walk, memory,
                [&](int channel, double grad, double shifted) { keep(channel, GradSums{grad, shifted}); });
}

FASTBN_DEVICE double sum_grad_xhat(const BackwardParams& params, int64_t channel, const GradSums& sums) {
  const double mean = params.mean[channel];
  const double pivot = params.dtype == DType::float64 ? mean : double(float(mean));
  return sum_grad_xhat_of(sums.grad, sums.shifted, pivot, mean, params.inv_std[channel]);
}

// Writes what is wanted of a channel's sums over all of its elements.
FASTBN_DEVICE void save_grad_sums(const BackwardParams& params, int64_t channel, double sum_grad, double xhat) {
  if (params.sum_grad) params.sum_grad[channel] = sum_grad;
  if (params.sum_grad_xhat) params.sum_grad_xhat[channel] = xhat;
  if (params.grad_bias.defined()) params.grad_bias.store(channel, sum_grad);
  if (params.grad_weight.defined()) params.grad_weight.store(channel, xhat);
}

}  // namespace fastbn::cuda
