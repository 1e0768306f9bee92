// grad_z = grad_out * activation'(z), over an octet: from the mask where there is one, else z is recomputed from the
// input and the residual.
#pragma once

#include "cuda/activate.cuh"
#include "cuda/octet.cuh"
#include "cuda/slab.cuh"
#include "cuda/walk.cuh"
#include "math/affine.h"
#include "math/params.h"
#include "math/plan.h"

namespace fastbn::cuda {

template <class T>
class GradZ {
 public:
  using A = acc_t<T>;

  struct Item {
    Octet<T> x, grad_out, residual;
    uint8_t mask;
  };

  // needs_x: whether the caller uses x for more than z.
  FASTBN_DEVICE GradZ(const BackwardParams& params, const Plan& plan, bool needs_x)
      : input_(static_cast<const T*>(params.input)),
        grad_out_(static_cast<const T*>(params.grad_out)),
        activation_(params.activation),
        vectorized_(plan.vectorized) {
    if (is_piecewise_linear(activation_)) mask_ = params.mask;
    const bool needs_z = activation_ != Activation::none && !mask_;
    if (needs_z) residual_ = static_cast<const T*>(params.residual);
    if (!needs_z && !needs_x) input_ = nullptr;
  }

  FASTBN_DEVICE Item load(const Step& step) const {
    Item item = {};
    item.grad_out = load_octet(grad_out_ + step.offset, step.count, vectorized_);
    if (input_) item.x = load_octet(input_ + step.offset, step.count, vectorized_);
    if (residual_) item.residual = load_octet(residual_ + step.offset, step.count, vectorized_);
    if (mask_) item.mask = mask_[step.mask_byte];
    return item;
  }

  // To keep on chip what `load` reads of tensors, and to load it from there; a bit an element is not worth a place.
  FASTBN_DEVICE void fetch(const Slab<T>& slab, const Step& step, int slot) const {
    slab.fetch(slot, 0, grad_out_ + step.offset, step.count, vectorized_);
    if (input_) slab.fetch(slot, 1, input_ + step.offset, step.count, vectorized_);
    if (residual_) slab.fetch(slot, 2, residual_ + step.offset, step.count, vectorized_);
  }

  FASTBN_DEVICE Item load(const Slab<T>& slab, const Step& step, int slot) const {
    Item item = {};
    item.grad_out = slab.load(slot, 0);
    if (input_) item.x = slab.load(slot, 1);
    if (residual_) item.residual = slab.load(slot, 2);
    if (mask_) item.mask = mask_[step.mask_byte];
    return item;
  }

  template <int channels>
  FASTBN_DEVICE void compute(const Item& item, const Affine<A> (&affine)[channels], A (&grad)[octet]) const {
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) grad[i] = item.grad_out[i];
    if (mask_) {
      FASTBN_UNROLL
      for (int i = 0; i < octet; ++i) {
        grad[i] = activation_backward_masked(activation_, (item.mask >> i & 1) != 0, grad[i]);
      }
      return;
    }
    A z[octet];
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      z[i] = affine[i % channels].apply(item.x[i]) + (residual_ ? item.residual[i] : A(0));
    }
    activate_backward(activation_, z, grad);
  }

 private:
  const T* input_;
  const T* grad_out_;
  const T* residual_ = nullptr;
  const uint8_t* mask_ = nullptr;
  Activation activation_;
  bool vectorized_;
};

template <class A>
FASTBN_DEVICE Affine<A> affine_of(const BackwardParams& params, int64_t channel) {
  return Affine<A>::make(params.mean[channel], params.inv_std[channel], params.weight.load_or(channel, 1),
                         params.bias.load_or(channel, 0));
}

}  // namespace fastbn::cuda
