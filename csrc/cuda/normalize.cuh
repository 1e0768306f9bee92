// The last step of a forward pass over an octet, which every schedule ends with.
#pragma once

#include "cuda/activate.cuh"
#include "cuda/octet.cuh"
#include "cuda/walk.cuh"
#include "math/affine.h"
#include "math/params.h"

namespace fastbn::cuda {

// output = activation((x - mean) * inv_std * weight + bias + residual), with a bit an element for backward where asked.
template <class T>
class Normalize {
 public:
  using A = acc_t<T>;

  FASTBN_DEVICE Normalize(const ForwardParams& params, const Plan& plan)
      : residual_(static_cast<const T*>(params.residual)),
        output_(static_cast<T*>(params.output)),
        mask_(params.mask),
        activation_(params.activation),
        vectorized_(plan.vectorized) {}

  FASTBN_DEVICE Octet<T> load_residual(const Step& step) const {
    return residual_ ? load_octet(residual_ + step.offset, step.count, vectorized_) : Octet<T>{};
  }

  template <int channels>
  FASTBN_DEVICE void operator()(const Step& step, const Octet<T>& x, const Octet<T>& residual,
                                const Affine<A> (&affine)[channels]) const {
    A z[octet];
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) z[i] = affine[i % channels].apply(x[i]);
    if (residual_) {
      FASTBN_UNROLL
      for (int i = 0; i < octet; ++i) z[i] += residual[i];
    }
    if (mask_) mask_[step.mask_byte] = mask_of(activation_, z, step.count);
    activate(activation_, z);
    store_octet(output_ + step.offset, step.count, vectorized_, z);
  }

 private:
  const T* residual_;
  T* output_;
  uint8_t* mask_;
  Activation activation_;
  bool vectorized_;
};

}  // namespace fastbn::cuda
