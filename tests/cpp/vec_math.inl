// Checks the vector functions of FASTBN_ISA against double: relative error of at most 2 ulp for every magnitude and
// sign, and libm's results for zeros, infinities, NaN, overflow and underflow. It tests one float in 2503, or every
// float if given an argument. It also checks the conversions of half types against those of csrc/math.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "check.h"
#include "cpu/simd/vec_math.h"
#include "cpu/simd/vec_memory.h"

using namespace fastbn;
using namespace fastbn::cpu::FASTBN_ISA;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

// Returns the error in units of the spacing of floats at `exact`, with subnormals as coarse as the smallest normal.
double error_in_ulps(float actual, double exact) {
  if (std::isnan(exact)) return std::isnan(actual) ? 0 : 1e9;
  if (float(exact) == actual) return 0;
  if (std::isinf(float(exact)) || !std::isfinite(actual)) return 1e9;
  int exponent;
  std::frexp(exact, &exponent);
  return std::abs(double(actual) - exact) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}

// Over the floats from `low` to `high`, and the special values among them.
template <class Function, class Exact>
void check_function(const char* name, uint32_t step, float low, float high, Function function, Exact exact) {
  double worst = 0;
  float at = 0;
  auto check = [&](float x) {
    if (x < low || x > high) return;
    const double error = error_in_ulps(function(Vec<float>(x)).part[0][0], exact(double(x)));
    if (error > worst) worst = error, at = x;
  };
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += step) check(bit_cast<float>(uint32_t(bits)));
  for (float x : {0.0f, -0.0f, inf, -inf, std::numeric_limits<float>::quiet_NaN(), 88.72283f, 88.72284f, -87.33655f,
                  -103.97f, -104.0f, 1.0f, -1.0f, 4.0f})
    check(x);
  std::printf("%s: %.3f ulp at %g\n", name, worst, double(at));
  CHECK(worst <= 2);
}

// Returns x as the conversion sees it: AVX-512 BF16 flushes subnormal floats to zero.
template <class T>
float stored(float x) {
#if defined(__AVX512BF16__)
  if (std::is_same_v<T, bfloat16> && std::fpclassify(x) == FP_SUBNORMAL) return std::copysign(0.0f, x);
#endif
  return x;
}

// Checks the conversion of every half, and of floats on both sides of every tie.
template <class T>
void check_conversions() {
  constexpr int lanes = Vec<float>::lanes;
  const auto same = [](float a, float b) {
    return std::isnan(a) ? std::isnan(b) : bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b);
  };
  for (uint32_t upper = 0; upper < 1u << 16; upper += lanes) {
    T halves[lanes];
    float values[lanes];
    for (int i = 0; i < lanes; ++i) halves[i].bits = uint16_t(upper + i);
    store(values, from_order_of<T>(load(halves, AllLanes<T>{})));
    for (int i = 0; i < lanes; ++i) CHECK(same(to_acc(halves[i]), values[i]));
    for (uint32_t lower : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x3000u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      for (int i = 0; i < lanes; ++i) values[i] = bit_cast<float>((upper + i) << 16 | lower);
      store(halves, load(values, AllLanes<T>{}));
      for (int i = 0; i < lanes; ++i) CHECK(same(to_acc(from_acc<T>(stored<T>(values[i]))), to_acc(halves[i])));
    }
  }
}

// This function is separate from main, which must not contain instructions that the machine may lack.
__attribute__((noinline)) int run(uint32_t step);

}  // namespace

int main(int count, char**) {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return fastbn::test::skipped;
#elif defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512dq")) return fastbn::test::skipped;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2")) return fastbn::test::skipped;
#endif
  return run(count > 1 ? 1 : 2503);
}

namespace {

int run(uint32_t step) {
  check_function(
      "exp", step, -inf, inf, [](Vec<float> x) FASTBN_INLINE_LAMBDA { return exp(x); },
      [](double x) { return std::exp(x); });
  check_function(
      "expm1", step, -inf, 0, [](Vec<float> x) FASTBN_INLINE_LAMBDA { return expm1(x); },
      [](double x) { return std::expm1(x); });
  check_function(
      "log1p", step, 0, 1, [](Vec<float> x) FASTBN_INLINE_LAMBDA { return log1p(x); },
      [](double x) { return std::log1p(x); });
  check_function(
      "erf", step, -inf, inf, [](Vec<float> x) FASTBN_INLINE_LAMBDA { return erf(x); },
      [](double x) { return std::erf(x); });
  check_conversions<bfloat16>();
  check_conversions<float16>();
  return fastbn::test::result();
}

}  // namespace
