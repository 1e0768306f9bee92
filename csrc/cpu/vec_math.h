// exp, expm1 and erf of vectors, under the names by which csrc/math asks for them. Those of float are polynomials,
// fitted for the least relative error, within 2 ulp (tests/cpp/vec_math.inl); those of double are libm's, lane by lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vec.h"

namespace fastbn::cpu::FASTBN_ISA {

template <class Function>
FASTBN_INLINE Vec<double> map_lanes(Vec<double> x, Function function) {
  double lane[Vec<double>::lanes];
  std::memcpy(lane, &x.part, sizeof(lane));
  for (double& value : lane) value = function(value);
  std::memcpy(&x.part, lane, sizeof(lane));
  return x;
}
FASTBN_INLINE Vec<double> exp(Vec<double> x) {
  return map_lanes(x, [](double value) { return fastbn::exp(value); });
}
FASTBN_INLINE Vec<double> expm1(Vec<double> x) {
  return map_lanes(x, [](double value) { return fastbn::expm1(value); });
}
FASTBN_INLINE Vec<double> erf(Vec<double> x) {
  return map_lanes(x, [](double value) { return fastbn::erf(value); });
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int terms>
FASTBN_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[terms]) {
  Vec<float> sum(c[terms - 1]);
  for (int i = terms - 2; i >= 0; --i) sum = sum * x + Vec<float>(c[i]);
  return sum;
}

// NaN stays NaN.
FASTBN_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  x = select(x < Vec<float>(low), Vec<float>(low), x);
  return select(x > Vec<float>(high), Vec<float>(high), x);
}

// x = n log(2) + r with |r| <= log(2) / 2, and exp(r) - 1.
struct ReducedExp {
  Vec<uint32_t> n;
  Vec<float> expm1_r;

  FASTBN_INLINE explicit ReducedExp(Vec<float> x) {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const Vec<float> magic(12582912.0f), shifted = x * Vec<float>(1.44269504f) + magic, rounded = shifted - magic;
    n = bit_cast_lanes<uint32_t>(shifted) - Vec<uint32_t>(0x4b400000u);
    // log(2) in two parts, the first of few digits, so that its product with n is exact.
    const Vec<float> r = (x - rounded * Vec<float>(0.693359375f)) + rounded * Vec<float>(2.12194440e-4f);
    constexpr float c[] = {0.49999997f, 0.16666539f, 0.041667223f, 0.00836718082f, 0.00138823956f};
    expm1_r = r + r * r * polynomial(r, c);
  }

  // 2^k for k in [-126, 127].
  static FASTBN_INLINE Vec<float> power_of_2(const Vec<uint32_t>& k) {
    return bit_cast_lanes<float>((k + Vec<uint32_t>(127u)) << 23);
  }
};

FASTBN_INLINE Vec<float> exp(Vec<float> x) {
  // Beyond, the result is 0 or infinite. The power of 2 is taken in two steps, so that subnormal results come out
  // right.
  const ReducedExp reduced(clamp(x, -104.0f, 89.0f));
  const Vec<uint32_t> half = bit_cast_lanes<uint32_t>(bit_cast_lanes<int32_t>(reduced.n) >> 1);
  const Vec<float> mantissa = Vec<float>(1.0f) + reduced.expm1_r;
  return mantissa * ReducedExp::power_of_2(half) * ReducedExp::power_of_2(reduced.n - half);
}

// Of x <= 0, as elu needs it.
FASTBN_INLINE Vec<float> expm1(Vec<float> x) {
  const ReducedExp reduced(clamp(x, -20.0f, 0.0f));
  const Vec<float> power = ReducedExp::power_of_2(reduced.n);
  return reduced.expm1_r * power + (power - Vec<float>(1.0f));
}

FASTBN_INLINE Vec<float> erf(Vec<float> x) {
  const Vec<float> magnitude = select(x < Vec<float>(0.0f), -x, x);
  // erf(x) / x - 1 for |x| <= 1, in x^2.
  constexpr float near[] = {0.128379166f,   -0.37612626f,     0.112835854f,   -0.026853811f,
                            0.00518832775f, -0.000801019312f, 7.85386073e-05f};
  const Vec<float> small = x + x * polynomial(x * x, near);
  // log(1 - erf(x)) for 1 <= x <= 4; from there on erf rounds to 1.
  constexpr float far[] = {-0.000320572988f, -1.12717164f,    -0.63801223f,   -0.103218213f,
                           0.0218896456f,    -0.00296011497f, 0.000187604892f};
  const Vec<float> large = Vec<float>(1.0f) - exp(polynomial(clamp(magnitude, 0.0f, 4.0f), far));
  return select(magnitude > Vec<float>(1.0f), select(x < Vec<float>(0.0f), -large, large), small);
}

// Activations as loops know them. Those with an exp or erf are called: each is longer than all the rest of a loop, and
// every loop would have all of them. The others, without the call, keep a loop's coefficients in registers.
enum class Known { none, relu, uncurved, curved };

inline Known known_of(Activation activation) {
  switch (activation) {
    case Activation::none: return Known::none;
    case Activation::relu: return Known::relu;
    case Activation::elu:
    case Activation::silu:
    case Activation::gelu: return Known::curved;
    default: return Known::uncurved;
  }
}

template <class A>
__attribute__((noinline)) void activate_curved(Activation activation, Vec<A>& z) {
  switch (activation) {
    case Activation::elu: z = activation_forward(Activation::elu, z); break;
    case Activation::silu: z = activation_forward(Activation::silu, z); break;
    default: z = activation_forward(Activation::gelu, z);
  }
}
template <class A>
__attribute__((noinline)) void differentiate_curved(Activation activation, const Vec<A>& z, Vec<A>& grad) {
  switch (activation) {
    case Activation::elu: grad = activation_backward(Activation::elu, z, grad); break;
    case Activation::silu: grad = activation_backward(Activation::silu, z, grad); break;
    default: grad = activation_backward(Activation::gelu, z, grad);
  }
}

// activation(z), and grad * activation'(z); `known` is that of the activation.
template <Known known, class A>
FASTBN_INLINE Vec<A> activate(Activation activation, Vec<A> z) {
  if constexpr (known == Known::none) return z;
  if constexpr (known == Known::relu) return activation_forward(Activation::relu, z);
  if constexpr (known == Known::curved) activate_curved(activation, z);
  if constexpr (known != Known::uncurved) return z;
  if (activation == Activation::leaky_relu) return activation_forward(Activation::leaky_relu, z);
  if (activation == Activation::relu6) return activation_forward(Activation::relu6, z);
  return activation_forward(Activation::hardswish, z);
}
template <Known known, class A>
FASTBN_INLINE Vec<A> differentiate(Activation activation, const Vec<A>& z, Vec<A> grad) {
  if constexpr (known == Known::relu) return activation_backward(Activation::relu, z, grad);
  if constexpr (known == Known::curved) differentiate_curved(activation, z, grad);
  if constexpr (known != Known::uncurved) return grad;
  if (activation == Activation::leaky_relu) return activation_backward(Activation::leaky_relu, z, grad);
  if (activation == Activation::relu6) return activation_backward(Activation::relu6, z, grad);
  return activation_backward(Activation::hardswish, z, grad);
}

}  // namespace fastbn::cpu::FASTBN_ISA
