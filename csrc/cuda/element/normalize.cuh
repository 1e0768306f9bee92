// The output of a vector of 8, with which a forward of every schedule ends.
#pragma once

#include <cmath>

#include "cuda/block/vec8.cuh"
#include "cuda/block/walk.cuh"
#include "cuda/element/activate.cuh"
#include "math/affine.h"
#include "math/params.h"

namespace fastbn::cuda {

// The function that stores output = activation((x - mean) * inv_std * weight + bias + residual), and a mask of one bit
// per element if wanted.
template <class T, bool aligned>
class Normalize {
 public:
  using A = acc_t<T>;

  FASTBN_DEVICE Normalize(const ForwardParams& params, const Plan& plan)
      : residual_(static_cast<const T*>(params.residual)),
        output_(static_cast<T*>(params.output)),
        layout_(params.layout),
        mask_(params.mask),
        activation_(params.activation),
        activation_param_(params.activation_param),
        lower_bound_(params.activation == Activation::relu ? A(0) : -INFINITY),
        vectorized_(plan.vectorized) {}

  FASTBN_DEVICE Vec8<T> load_residual(const Step& step) const {
    Vec8<T> residual;  // stays uninitialised and unused without a residual
    if (residual_) residual = load_vec<aligned>(residual_ + step.offset, step.count, vectorized_);
    return residual;
  }

  // Stores the output of a vector. `light_epilogue` is from dispatch_epilogue.
  template <bool light_epilogue, int channels>
  FASTBN_DEVICE void operator()(const Step& step, const Vec8<T>& x, const Vec8<T>& residual,
                                const Affine<A> (&affine)[channels]) const {
    A z[vec_size];
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) z[i] = affine[i % channels].apply(x[i]);
    if (residual_) {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) z[i] += residual[i];
    }
    if (mask_) {
      mask_[aligned ? step.offset / vec_size : layout_.mask_byte(step.offset)] =
          mask_of(light_epilogue ? Activation::relu : activation_, z, aligned ? vec_size : step.count);
    }
    if constexpr (light_epilogue) {
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) z[i] = device::max_or_nan(z[i], lower_bound_);
    } else {
      activate(activation_, activation_param_.template in<A>(), z);
    }
    store_vec<aligned>(output_ + step.offset, step.count, vectorized_, z);
  }

 private:
  const T* residual_;
  T* output_;
  const Layout& layout_;
  uint8_t* mask_;
  Activation activation_;
  const ActivationParam& activation_param_;
  A lower_bound_;  // of the output, with a light epilogue
  bool vectorized_;
};

}  // namespace fastbn::cuda
