// The eight activations and their derivatives, with the branches that torch takes at the boundaries, and at NaN those
// of its vectorised loops for CPUs: comparisons are written so that a NaN takes the branch that is meant for it. F is
// float, double, or a vector of either that has the same operators and `select`, `exp`, `expm1`, `erf`.
#pragma once

#include <cmath>

#include "math/macros.h"

namespace fastbn {

// The order is the contract: it is the `activation` argument of every op.
enum class Activation : int { none, relu, leaky_relu, relu6, elu, silu, gelu, hardswish };
constexpr int activation_count = 8;

// Piecewise linear activations know their derivative from one bit an element.
FASTBN_INLINE constexpr bool is_piecewise_linear(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu || activation == Activation::relu6;
}

constexpr double leaky_slope = 0.01;

template <class F>
FASTBN_INLINE F select(bool condition, F yes, F no) {
  return condition ? yes : no;
}
FASTBN_INLINE float exp(float x) { return ::expf(x); }
FASTBN_INLINE double exp(double x) { return ::exp(x); }
FASTBN_INLINE float expm1(float x) { return ::expm1f(x); }
FASTBN_INLINE double expm1(double x) { return ::expm1(x); }
FASTBN_INLINE float erf(float x) { return ::erff(x); }
FASTBN_INLINE double erf(double x) { return ::erf(x); }

// Phi(z), the normal distribution function.
template <class F>
FASTBN_INLINE F normal_cdf(F z) {
  return F(0.5) * (F(1) + erf(z * F(0.70710678118654752440)));
}

// relu leaves -0 as it is, as torch's does on a CPU. (CUDA's loops for relu make it +0.)
template <class F>
FASTBN_INLINE F activation_forward(Activation activation, F z) {
  switch (activation) {
    case Activation::relu: return select(z < F(0), F(0), z);
    case Activation::leaky_relu: return select(z > F(0), z, z * F(leaky_slope));
    case Activation::relu6: return select(z <= F(0), F(0), select(z >= F(6), F(6), z));
    case Activation::elu: return select(z <= F(0), expm1(z), z);
    case Activation::silu: return z / (F(1) + exp(-z));
    case Activation::gelu: return z * normal_cdf(z);
    case Activation::hardswish: {
      const F ramp = z + F(3);
      return z * select(ramp <= F(0), F(0), select(ramp >= F(6), F(6), ramp)) / F(6);
    }
    default: return z;
  }
}

// True where a piecewise linear activation takes its upper branch.
template <class F>
FASTBN_INLINE auto activation_is_upper(Activation activation, F z) -> decltype(z > F(0)) {
  switch (activation) {
    case Activation::relu: return !(z <= F(0));
    case Activation::relu6: return (z > F(0)) & (z < F(6));
    default: return z > F(0);
  }
}

// grad_z of a piecewise linear activation from its mask.
template <class F, class Mask>
FASTBN_INLINE F activation_backward_masked(Activation activation, Mask upper, F grad_out) {
  return select(upper, grad_out, activation == Activation::leaky_relu ? grad_out * F(leaky_slope) : F(0));
}

// grad_out * activation'(z).
template <class F>
FASTBN_INLINE F activation_backward(Activation activation, F z, F grad_out) {
  switch (activation) {
    case Activation::relu:
    case Activation::leaky_relu:
    case Activation::relu6: return activation_backward_masked(activation, activation_is_upper(activation, z), grad_out);
    case Activation::elu: return select(z > F(0), grad_out, grad_out * exp(z));
    case Activation::silu: {
      // 1 - s cancels where s is nearly 1: there it is e * s.
      const F e = exp(-z), s = F(1) / (F(1) + e);
      return grad_out * (s * (F(1) + z * select(z > F(0), e * s, F(1) - s)));
    }
    case Activation::gelu: {
      const F density = exp(z * z * F(-0.5)) * F(0.39894228040143267794);
      return grad_out * (normal_cdf(z) + z * density);
    }
    case Activation::hardswish:
      return select(z <= F(-3), F(0), select(z >= F(3), grad_out, grad_out * (z * F(1.0 / 3) + F(0.5))));
    default: return grad_out;
  }
}

}  // namespace fastbn
