// Vectors of float or double on the compilers' vector extensions, for the instruction set that the including file is
// compiled for. They have the operators and functions that csrc/math asks of an F, so formulas are written once.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/activation.h"
#include "math/types.h"

namespace fastbn::cpu::FASTBN_ISA {

// A vector has `parts` registers: two if that makes it a full cache line of the type in memory, which is float with
// AVX2 and bfloat16 with AVX-512 BF16, whose only type it is. Otherwise a line would be visited by halves, and where
// rows lie a stride apart it has often left L1 in between.
#if defined(__AVX512BF16__)
constexpr int register_bytes = 64, register_count = 32, parts = 2;
#elif defined(__AVX512F__)
constexpr int register_bytes = 64, register_count = 32, parts = 1;
#elif defined(__AVX2__)
constexpr int register_bytes = 32, register_count = 16, parts = 2;
#else
constexpr int register_bytes = 16, register_count = 16, parts = 1;
#endif

// Whether loops on elements of T are compiled for relu, and with one call per vector for all other activations, which
// halves their code and the time to compile it: those of float64, whose longer formulas are calls anyway (an estimate),
// and, on x86-64, the portable ones, which processors with AVX2 do not run.
template <class T>
constexpr bool has_few_kinds =
#if defined(__x86_64__) && !defined(__AVX2__)
    true;
#else
    std::is_same_v<T, double>;
#endif

// Calls `function(i)` for each part. A loop over the parts would be unrolled only when all of it has been inlined,
// which takes g++ 12 several times as long to compile.
template <class Function>
FASTBN_INLINE void for_each_part(Function&& function) {
  static_assert(parts <= 2);
  function(std::integral_constant<int, 0>{});
  if constexpr (parts == 2) function(std::integral_constant<int, 1>{});
}

// Specialised rather than written with a dependent vector_size, which g++ compares without its attribute.
template <class A>
struct NativeVectors;
template <>
struct NativeVectors<float> {
  typedef float Values __attribute__((vector_size(register_bytes)));
  typedef int32_t Masks __attribute__((vector_size(register_bytes)));
};
template <>
struct NativeVectors<double> {
  typedef double Values __attribute__((vector_size(register_bytes)));
  typedef int64_t Masks __attribute__((vector_size(register_bytes)));
};
template <>
struct NativeVectors<int32_t> {
  typedef int32_t Values __attribute__((vector_size(register_bytes)));
};
template <>
struct NativeVectors<uint32_t> {
  typedef uint32_t Values __attribute__((vector_size(register_bytes)));
};
template <>
struct NativeVectors<uint16_t> {
  typedef uint16_t Values __attribute__((vector_size(register_bytes)));
};
using Floats = NativeVectors<float>::Values;
using Doubles = NativeVectors<double>::Values;
using Words = NativeVectors<uint32_t>::Values;
using Shorts = NativeVectors<uint16_t>::Values;

// The result of a comparison, per lane: one bit in a mask register with AVX-512, elsewhere all bits of the lane. Only
// FASTBN_INLINE functions take Mask, Vec and the types above, so no calling convention for wide vectors is involved.
template <class A>
struct Mask {
#if defined(__AVX512F__)
  using Native = std::conditional_t<sizeof(A) == 4, uint16_t, uint8_t>;
#else
  using Native = typename NativeVectors<A>::Masks;
#endif
  Native part[parts];
};

template <class A>
struct Vec {
  using Native = typename NativeVectors<A>::Values;
  static constexpr int part_lanes = register_bytes / int(sizeof(A)), lanes = parts * part_lanes;
  Native part[parts];

  Vec() = default;
  FASTBN_INLINE explicit Vec(A value) {
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { part[i] = value - Native{}; });
  }
  template <class Other>
    requires std::is_arithmetic_v<Other> && (!std::is_same_v<Other, A>)
  FASTBN_INLINE explicit Vec(Other value) : Vec(A(value)) {}

  FASTBN_INLINE Vec& operator+=(const Vec& other) {
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { part[i] += other.part[i]; });
    return *this;
  }
};

// Applies a function to each part of the arguments.
template <class Result, class Function, class... Arguments>
FASTBN_INLINE Result by_parts(Function&& function, const Arguments&... arguments) {
  Result result;
  for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { result.part[i] = function(arguments.part[i]...); });
  return result;
}

template <class To, class From>
FASTBN_INLINE Vec<To> bit_cast_lanes(const Vec<From>& x) {
  return by_parts<Vec<To>>([](auto a) FASTBN_INLINE_LAMBDA { return __builtin_bit_cast(typename Vec<To>::Native, a); },
                           x);
}

// clang-format off
template <class A> FASTBN_INLINE Vec<A> operator+(Vec<A> a, const Vec<A>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] += b.part[i]; }); return a; }
template <class A> FASTBN_INLINE Vec<A> operator-(Vec<A> a, const Vec<A>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] -= b.part[i]; }); return a; }
template <class A> FASTBN_INLINE Vec<A> operator*(Vec<A> a, const Vec<A>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] *= b.part[i]; }); return a; }
template <class A> FASTBN_INLINE Vec<A> operator/(Vec<A> a, const Vec<A>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] /= b.part[i]; }); return a; }
template <class A> FASTBN_INLINE Vec<A> operator-(Vec<A> a) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] = -a.part[i]; }); return a; }
template <class A> FASTBN_INLINE Vec<A> operator<<(Vec<A> a, int bits) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] = a.part[i] << bits; }); return a; }
template <class A> FASTBN_INLINE Vec<A> operator>>(Vec<A> a, int bits) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] = a.part[i] >> bits; }); return a; }
template <class A> FASTBN_INLINE Mask<A> operator&(Mask<A> a, const Mask<A>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] &= b.part[i]; }); return a; }
template <class A> FASTBN_INLINE Mask<A> operator^(Mask<A> a, const Mask<A>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] ^= b.part[i]; }); return a; }
template <class A> FASTBN_INLINE Mask<A> operator!(Mask<A> a) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] = typename Mask<A>::Native(~a.part[i]); }); return a; }
#if defined(__AVX512F__)
template <int predicate> FASTBN_INLINE uint16_t compare(Floats a, Floats b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, predicate); }
template <int predicate> FASTBN_INLINE uint8_t compare(Doubles a, Doubles b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, predicate); }
template <int predicate, class A> FASTBN_INLINE Mask<A> compare(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { m.part[i] = compare<predicate>(a.part[i], b.part[i]); }); return m; }
template <class A> FASTBN_INLINE Mask<A> operator<=(const Vec<A>& a, const Vec<A>& b) { return compare<_CMP_LE_OQ>(a, b); }
template <class A> FASTBN_INLINE Mask<A> operator>=(const Vec<A>& a, const Vec<A>& b) { return compare<_CMP_GE_OQ>(a, b); }
template <class A> FASTBN_INLINE Mask<A> operator<(const Vec<A>& a, const Vec<A>& b) { return compare<_CMP_LT_OQ>(a, b); }
template <class A> FASTBN_INLINE Mask<A> operator>(const Vec<A>& a, const Vec<A>& b) { return compare<_CMP_GT_OQ>(a, b); }
FASTBN_INLINE Floats select_lanes(uint16_t mask, Floats yes, Floats no) { return (Floats)_mm512_mask_blend_ps(mask, (__m512)no, (__m512)yes); }
FASTBN_INLINE Doubles select_lanes(uint8_t mask, Doubles yes, Doubles no) { return (Doubles)_mm512_mask_blend_pd(mask, (__m512d)no, (__m512d)yes); }
#else
template <class A> FASTBN_INLINE Mask<A> operator<=(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { m.part[i] = a.part[i] <= b.part[i]; }); return m; }
template <class A> FASTBN_INLINE Mask<A> operator>=(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { m.part[i] = a.part[i] >= b.part[i]; }); return m; }
template <class A> FASTBN_INLINE Mask<A> operator<(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { m.part[i] = a.part[i] < b.part[i]; }); return m; }
template <class A> FASTBN_INLINE Mask<A> operator>(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { m.part[i] = a.part[i] > b.part[i]; }); return m; }
#endif
// clang-format on

#if !defined(__AVX512F__)
template <class Masks, class Values>
FASTBN_INLINE Values select_lanes(Masks mask, Values yes, Values no) {
#if defined(__AVX2__)
  return mask ? yes : no;
#else  // g++ 12 fails on a vector ?: for SSE2
  for (int i = 0; i < int(sizeof(yes) / sizeof(yes[0])); ++i) no[i] = mask[i] ? yes[i] : no[i];
  return no;
#endif
}
#endif

template <class A>
FASTBN_INLINE Vec<A> select(const Mask<A>& mask, const Vec<A>& yes, const Vec<A>& no) {
  return by_parts<Vec<A>>([](auto m, auto y, auto n) FASTBN_INLINE_LAMBDA { return select_lanes(m, y, n); }, mask, yes,
                          no);
}

// Return a < b ? a : b and a > b ? a : b, which are b if one is NaN: on x86 one instruction. g++ finds it for AVX2, but
// not through the intrinsics of AVX-512.
// clang-format off
#if defined(__AVX512F__)
FASTBN_INLINE Floats min_lanes(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
FASTBN_INLINE Floats max_lanes(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#else
FASTBN_INLINE Floats min_lanes(Floats a, Floats b) { return select_lanes(a < b, a, b); }
FASTBN_INLINE Floats max_lanes(Floats a, Floats b) { return select_lanes(a > b, a, b); }
#endif
FASTBN_INLINE Vec<float> min(Vec<float> a, const Vec<float>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] = min_lanes(a.part[i], b.part[i]); }); return a; }
FASTBN_INLINE Vec<float> max(Vec<float> a, const Vec<float>& b) { for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { a.part[i] = max_lanes(a.part[i], b.part[i]); }); return a; }
// clang-format on

}  // namespace fastbn::cpu::FASTBN_ISA
