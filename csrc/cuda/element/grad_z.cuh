// grad_z = grad_out * activation'(z) of a vector of 8. The derivative comes from the mask if there is one; else z is
// recomputed from the input and the residual.
#pragma once

#include "cuda/block/vec8.cuh"
#include "cuda/block/walk.cuh"
#include "cuda/element/activate.cuh"
#include "math/affine.h"
#include "math/params.h"
#include "plan/plan.h"

namespace fastbn::cuda {

template <class T, bool aligned>
class GradZ {
 public:
  using A = acc_t<T>;

  struct Item {
    Vec8<T> x, grad_out, residual;
    uint8_t mask;
  };
  static constexpr int bytes_in_flight = 2 * sizeof(Vec8<T>);  // per item, without a residual

  // `needs_x`: whether the caller uses x for more than z. Keeps a reference to the parameters, which are the kernel's.
  FASTBN_DEVICE GradZ(const BackwardParams& params, const Plan& plan, bool needs_x)
      : params_(params), vectorized_(plan.vectorized) {
    masked_ = params.mask && is_piecewise_linear(params.activation);
    const bool needs_z = params.activation != Activation::none && !masked_;
    reads_residual_ = needs_z && params.residual;
    reads_input_ = needs_z || needs_x;
  }

  // Returns whether 0 is right for a channel's sum(grad_z * (x - pivot)), or the sum not wanted, if sum(grad_z) is not
  // 0.
  FASTBN_DEVICE bool may_be_zero(int64_t channel) const {
    return !reads_input_ || !loses_underflowed_products(params_.inv_std[channel]);
  }
  FASTBN_DEVICE bool reads_input() const { return reads_input_; }

  FASTBN_DEVICE Item load(const Step& step) const {
    Item item;
    item.grad_out = load_vec<aligned>(at(params_.grad_out, step), step.count, vectorized_);
    if (reads_input_) item.x = load_vec<aligned>(at(params_.input, step), step.count, vectorized_);
    if (reads_residual_) item.residual = load_vec<aligned>(at(params_.residual, step), step.count, vectorized_);
    item.mask = load_mask(step);
    return item;
  }

  // Return an element's x, or 0 if it is not read, and its grad_z.
  FASTBN_DEVICE A load_x(const Step& step, int i) const {
    return reads_input_ ? to_acc(at(params_.input, step)[i]) : A(0);
  }
  FASTBN_DEVICE A load_grad(const Step& step, int i, const Affine<A>& affine) const {
    const A grad = to_acc(at(params_.grad_out, step)[i]);
    if (masked_) return activation_backward_masked(params_.activation, bool(load_mask(step) >> i & 1), grad, param());
    if (params_.activation == Activation::none) return grad;
    A z = affine.apply(load_x(step, i));
    if (reads_residual_) z += to_acc(at(params_.residual, step)[i]);
    return activation_backward(params_.activation, z, grad, param());
  }

  FASTBN_DEVICE uint8_t load_mask(const Step& step) const {
    return masked_ ? params_.mask[aligned ? step.offset / vec_size : params_.layout.mask_byte(step.offset)] : 0;
  }

  // Calls use(std::true_type) if the derivative is short, from a mask or of an activation that has_light_epilogue
  // names; else use(std::false_type).
  template <class Use>
  FASTBN_DEVICE void dispatch_epilogue(Use use) const {
    if constexpr (!has_light_loops) {
      use(std::false_type());
    } else {
      masked_ || has_light_epilogue(params_.activation) ? use(std::true_type()) : use(std::false_type());
    }
  }

  // Computes grad_z of a vector. `light_epilogue` is from dispatch_epilogue.
  template <bool light_epilogue, int channels>
  FASTBN_DEVICE void compute(const Item& item, const Affine<A> (&affine)[channels], A (&grad)[vec_size]) const {
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) grad[i] = item.grad_out[i];
    if ((light_epilogue || !has_light_loops) && masked_) {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) {
        grad[i] = activation_backward_masked(params_.activation, (item.mask >> i & 1) != 0, grad[i], param());
      }
      return;
    }
    if (light_epilogue && params_.activation == Activation::none) return;
    A z[vec_size];
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) z[i] = affine[i % channels].apply(item.x[i]);
    if (reads_residual_) {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) z[i] += item.residual[i];
    }
    if constexpr (light_epilogue) {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) grad[i] = activation_backward(Relu(), z[i], grad[i], A(0));
    } else {
      activate_backward(params_.activation, param(), z, grad);
    }
  }

 private:
  FASTBN_DEVICE A param() const { return params_.activation_param.template in<A>(); }

  // Unaligned walks and float64 are not worth a second loop and its registers.
  static constexpr bool has_light_loops = aligned && sizeof(A) < sizeof(double);

  static FASTBN_DEVICE const T* at(const void* tensor, const Step& step) {
    return static_cast<const T*>(tensor) + step.offset;
  }

  const BackwardParams& params_;
  bool masked_, reads_input_, reads_residual_, vectorized_;
};

template <class A>
FASTBN_DEVICE Affine<A> affine_of(const BackwardParams& params, int64_t channel) {
  return Affine<A>::make(params.mean[channel], params.inv_std[channel], params.weight.load_or(channel, 1),
                         params.bias.load_or(channel, 0));
}

}  // namespace fastbn::cuda
