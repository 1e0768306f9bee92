// The gradients of a vector of 8, with which a backward of every schedule ends.
#pragma once

#include "cuda/block/coefficients.cuh"
#include "cuda/block/reduce.cuh"
#include "cuda/element/grad_z.cuh"
#include "math/grad_coefficients.h"

namespace fastbn::cuda {

// The function that stores grad_input = (grad_z - mean(grad_z) - xhat * mean(grad_z * xhat)) * weight * inv_std, or
// only grad_z * weight * inv_std if the statistics are frozen, and grad_residual = grad_z.
template <class T, bool aligned>
class InputGrad {
 public:
  using A = acc_t<T>;

  // `is_far` is the tile's any_is_far, with which its coefficients were made.
  FASTBN_DEVICE InputGrad(const BackwardParams& params, const Plan& plan, bool frozen, bool is_far)
      : grad_input_(static_cast<T*>(params.grad_input)),
        grad_residual_(static_cast<T*>(params.grad_residual)),
        frozen_(frozen),
        is_far_(is_far && sizeof(A) < sizeof(double)),
        vectorized_(plan.vectorized) {}

  // Stores the gradients of a vector. `light_epilogue` is from grad_z.dispatch_epilogue.
  template <bool light_epilogue, int channels>
  FASTBN_DEVICE void operator()(const Step& step, const GradZ<T, aligned>& grad_z,
                                const typename GradZ<T, aligned>::Item& item,
                                const GradCoefficients<A> (&coefficients)[channels]) const {
    Affine<A> affine[channels];
    FASTBN_UNROLL
    for (int i = 0; i < channels; ++i) affine[i] = coefficients[i].affine;
    A grad[vec_size];
    grad_z.template compute<light_epilogue>(item, affine, grad);
    if (grad_residual_) store_vec<aligned>(grad_residual_ + step.offset, step.count, vectorized_, grad);
    if (!grad_input_) return;
    if (is_far_) {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) grad[i] = coefficients[i % channels].grad().apply_far(grad[i], item.x[i]);
    } else {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) {
        const GradAffine<A> g = coefficients[i % channels].grad();
        grad[i] = frozen_ ? grad[i] * g.scale : g.apply(grad[i], item.x[i]);
      }
    }
    store_vec<aligned>(grad_input_ + step.offset, step.count, vectorized_, grad);
  }

  // Stores the gradients from grad_z, with frozen statistics.
  template <int channels, class Coefficients>
  FASTBN_DEVICE void store_frozen(const Step& step, const A (&grad_z)[vec_size],
                                  const Coefficients (&coefficients)[channels]) const {
    if (grad_residual_) store_vec<aligned>(grad_residual_ + step.offset, step.count, vectorized_, grad_z);
    if (!grad_input_) return;
    A grad[vec_size];
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) grad[i] = grad_z[i] * coefficients[i % channels].affine.scale;
    store_vec<aligned>(grad_input_ + step.offset, step.count, vectorized_, grad);
  }

 private:
  T* grad_input_;
  T* grad_residual_;
  bool frozen_, is_far_, vectorized_;
};

// Returns, in all threads of the block, whether the gradients of a tile have to be computed by apply_far.
template <class A, class Walk>
FASTBN_DEVICE bool any_is_far(const BackwardParams& params, const Walk& walk, uint32_t* votes) {
  if constexpr (sizeof(A) == sizeof(double)) return false;
  bool near = true;
  for_each_tile_channel(walk, [&](int, int64_t c) { near = near && !is_far_from_one(params.inv_std[c]); });
  return !block_agrees(near, votes);
}

// What the gradients of a channel depend on beside its sums.
struct ChannelOfGrads {
  double mean, inv_std, weight, bias;
};

FASTBN_DEVICE ChannelOfGrads channel_of_grads(const BackwardParams& params, int64_t channel) {
  return {params.mean[channel], params.inv_std[channel], params.weight.load_or(channel, 1),
          params.bias.load_or(channel, 0)};
}

template <class A>
FASTBN_DEVICE GradCoefficients<A> grad_coefficients(const ChannelOfGrads& c, double sum_grad, double sum_grad_xhat,
                                                    double count, bool is_far) {
  const auto grad = GradAffine<A>::make(c.mean, c.inv_std, c.weight, sum_grad, sum_grad_xhat, count, is_far);
  return {Affine<A>::make(c.mean, c.inv_std, c.weight, c.bias), grad.slope, grad.mean_grad, grad.rest};
}

}  // namespace fastbn::cuda
