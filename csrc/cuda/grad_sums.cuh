// The sums that the gradients of a channel need: of grad_z, and of grad_z * (x - pivot) about the rounded mean, which
// is corrected to xhat once a channel.
#pragma once

#include "cuda/grad_z.cuh"
#include "cuda/loop.cuh"
#include "cuda/reduce.cuh"

namespace fastbn::cuda {

struct GradSums {
  double grad = 0;
  double shifted = 0;
};

struct AddGradSums {
  FASTBN_DEVICE GradSums operator()(const GradSums& a, const GradSums& b) const {
    return {a.grad + b.grad, a.shifted + b.shifted};
  }
};

// Over a block's share. load(step, number) gives items of grad_z; keep(i, sums) is called in threads below `lanes` for
// the i-th of their channels. Without needs_x only grad is summed.
template <class T, class Walk, class Load, class Keep>
FASTBN_DEVICE void block_grad_sums(const Walk& walk, const ReduceMemory<Walk::channels>& memory, const GradZ<T>& grad_z,
                                   const Affine<acc_t<T>> (&affine)[Walk::channels], bool needs_x, Load load,
                                   Keep keep) {
  using A = acc_t<T>;
  constexpr int channels = Walk::channels;
  LongSum<A, channels> sum(memory.first), shifted(memory.second);
  int octets = 0;
  for_each_octet(walk, load, [&](const Step& step, const auto& item) {
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
    if (device::thread_index() < walk.lanes && i < walk.live) keep(i, merged);
  }
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
