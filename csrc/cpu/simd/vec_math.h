// exp, expm1, log1p and erf of vectors, under the names by which csrc/math asks for them. Those of float are
// polynomials, fitted for the minimum relative error, within 2 ulp (tests/cpp/vec_math.inl); those of double are
// libm's, lane by lane.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/vec.h"

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
FASTBN_INLINE Vec<double> log1p(Vec<double> x) {
  return map_lanes(x, [](double value) { return fastbn::log1p(value); });
}
FASTBN_INLINE Vec<double> erf(Vec<double> x) {
  return map_lanes(x, [](double value) { return fastbn::erf(value); });
}

// Returns c[0] + c[1] x + c[2] x^2 + ...
template <int terms>
FASTBN_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[terms]) {
  Vec<float> sum(c[terms - 1]);
  for (int i = terms - 2; i >= 0; --i) sum = sum * x + Vec<float>(c[i]);
  return sum;
}

// Returns x limited to [low, high]. NaN stays NaN.
FASTBN_INLINE Vec<float> clamp(const Vec<float>& x, float low, float high) {
  return min(Vec<float>(high), max(Vec<float>(low), x));
}

// The reduction x = n log(2) + r with |r| <= log(2) / 2, and exp(r) - 1. Adding 1.5 * 2^23 rounds to an integer, which
// is then in the low bits.
constexpr float integer_shift = 12582912.0f;
struct ReducedExp {
  Vec<float> n, expm1_r;

  FASTBN_INLINE explicit ReducedExp(const Vec<float>& x) {
    const Vec<float> shift(integer_shift);
    n = (x * Vec<float>(1.44269504f) + shift) - shift;
    // log(2) is split in two parts. The first has few digits, so that its product with n is exact.
    const Vec<float> r = (x - n * Vec<float>(0.693359375f)) + n * Vec<float>(2.12194440e-4f);
    constexpr float c[] = {0.49999997f, 0.16666539f, 0.041667223f, 0.00836718082f, 0.00138823956f};
    expm1_r = r + r * r * polynomial(r, c);
  }
};

// Returns 2^n for n in [-126, 127].
FASTBN_INLINE Vec<float> power_of_2(const Vec<float>& n) {
  const Vec<uint32_t> bits = bit_cast_lanes<uint32_t>(n + Vec<float>(integer_shift + 127.0f));
  return bit_cast_lanes<float>(bits << 23);
}

// Returns x * 2^n for x in [0.5, 2] and n in [-252, 254]; the result may be subnormal or infinite.
FASTBN_INLINE Vec<float> scale_by_power_of_2(const Vec<float>& x, const Vec<float>& n) {
#if defined(__AVX512F__)
  return by_parts<Vec<float>>(
      [](auto a, auto b) FASTBN_INLINE_LAMBDA { return (Floats)_mm512_scalef_ps((__m512)a, (__m512)b); }, x, n);
#else
  // Two steps, by powers that are normal numbers.
  const Vec<float> shift(integer_shift), half = (n * Vec<float>(0.5f) + shift) - shift;
  return x * power_of_2(half) * power_of_2(n - half);
#endif
}

FASTBN_INLINE Vec<float> exp(const Vec<float>& x) {
  const ReducedExp reduced(clamp(x, -104.0f, 89.0f));  // beyond, the result is 0 or infinite
  return scale_by_power_of_2(Vec<float>(1.0f) + reduced.expm1_r, reduced.n);
}

// Returns exp(x) - 1 for x <= 0, as elu needs it.
FASTBN_INLINE Vec<float> expm1(const Vec<float>& x) {
  const ReducedExp reduced(clamp(x, -20.0f, 0.0f));
  const Vec<float> power = power_of_2(reduced.n);
  return reduced.expm1_r * power + (power - Vec<float>(1.0f));
}

// Returns log(1 + x) for x in [0, 1], as softplus needs it: x - s * (x - r) with s = x / (2 + x) and a polynomial r in
// s^2, so that hardly anything but the difference rounds.
FASTBN_INLINE Vec<float> log1p(const Vec<float>& x) {
  const Vec<float> s = x / (Vec<float>(2.0f) + x), square = s * s;
  constexpr float c[] = {0.6666667f, 0.39999703f, 0.28592584f, 0.21703315f, 0.23239051f};
  return x - s * (x - square * polynomial(square, c));
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

// How the loops specialise on the activation. Long formulas are out of line, one call per vector: inlined, each would
// be longer than all the rest of a loop, and every loop would have all of them. silu is the exception: without the call
// a loop keeps its coefficients in registers, which makes loops with silu 1.3 to 2 times as fast (EPYC 9004).
// Loops that run rarely, and those of has_few_kinds, are compiled for few: `any` is one call per vector for all
// activations but relu.
enum class EpilogueKind { none, relu, silu, short_formula, out_of_line, any };

constexpr EpilogueKind kind_of(Activation activation, bool few) {
  if (form_of(activation) == Form::identity) return EpilogueKind::none;
  if (activation == Activation::relu) return EpilogueKind::relu;
  if (few) return EpilogueKind::any;
  if (activation == Activation::silu) return EpilogueKind::silu;
  return form_of(activation) == Form::long_formula ? EpilogueKind::out_of_line : EpilogueKind::short_formula;
}

// Returns whether kind_of returns that kind.
constexpr bool occurs(EpilogueKind kind, bool few) {
  return kind == EpilogueKind::none || kind == EpilogueKind::relu || (kind == EpilogueKind::any) == few;
}

// Calls `use(struct of the activation)` if the activation is of that kind.
template <EpilogueKind kind, class Use>
FASTBN_INLINE void with_activation_of(Activation activation, Use&& use) {
  with_activation(activation, [&](auto a) FASTBN_INLINE_LAMBDA {
    if constexpr (kind_of(a.id, kind == EpilogueKind::any) == kind) use(a);
  });
}

template <EpilogueKind kind, class A>
__attribute__((noinline)) void activate_out_of_line(Activation activation, A param, Vec<A>& z) {
  with_activation_of<kind>(activation, [&](auto a) FASTBN_INLINE_LAMBDA { z = activation_forward(a, z, param); });
}
template <EpilogueKind kind, class A>
__attribute__((noinline)) void differentiate_out_of_line(Activation activation, A param, const Vec<A>& z,
                                                         Vec<A>& grad) {
  with_activation_of<kind>(activation,
                           [&](auto a) FASTBN_INLINE_LAMBDA { grad = activation_backward(a, z, grad, param); });
}

// Return activation(z), and grad * activation'(z), for an activation of that kind.
template <EpilogueKind kind, class A>
FASTBN_INLINE Vec<A> activate(Activation activation, A param, Vec<A> z) {
  if constexpr (kind == EpilogueKind::relu && std::is_same_v<A, float>)
    return max(Vec<A>(0), z);  // one instruction
  else if constexpr (kind == EpilogueKind::out_of_line || kind == EpilogueKind::any)
    activate_out_of_line<kind>(activation, param, z);
  else
    with_activation_of<kind>(activation, [&](auto a) FASTBN_INLINE_LAMBDA { z = activation_forward(a, z, param); });
  return z;
}
template <EpilogueKind kind, class A>
FASTBN_INLINE Vec<A> differentiate(Activation activation, A param, const Vec<A>& z, Vec<A> grad) {
  if constexpr (kind == EpilogueKind::out_of_line || kind == EpilogueKind::any)
    differentiate_out_of_line<kind>(activation, param, z, grad);
  else
    with_activation_of<kind>(activation,
                             [&](auto a) FASTBN_INLINE_LAMBDA { grad = activation_backward(a, z, grad, param); });
  return grad;
}

}  // namespace fastbn::cpu::FASTBN_ISA
