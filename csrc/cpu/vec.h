// A vector of float or double as wide as the instruction set that the including file is compiled for, on the compilers'
// vector extensions. It has the operators and functions that csrc/math asks of an F, so formulas are written once.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/activation.h"
#include "math/types.h"

// Lambdas that take vectors, likewise always inlined.
#define FASTBN_INLINE_LAMBDA __attribute__((always_inline))

namespace fastbn::cpu::FASTBN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Specialised rather than written with a dependent vector_size, which g++ compares without its attribute.
template <class A>
struct NativeVectors;
template <>
struct NativeVectors<float> {
  typedef float Values __attribute__((vector_size(vector_bytes)));
  typedef int32_t Masks __attribute__((vector_size(vector_bytes)));
};
template <>
struct NativeVectors<double> {
  typedef double Values __attribute__((vector_size(vector_bytes)));
  typedef int64_t Masks __attribute__((vector_size(vector_bytes)));
};

// Only FASTBN_INLINE functions take Vec and Mask, so no calling convention for wide vectors is involved.
template <class A>
struct Mask {
  using Native = typename NativeVectors<A>::Masks;
  Native native;
};

template <class A>
struct Vec {
  static constexpr int lanes = vector_bytes / int(sizeof(A));
  using Native = typename NativeVectors<A>::Values;
  Native native;

  Vec() = default;
  FASTBN_INLINE Vec(Native value) : native(value) {}
  FASTBN_INLINE explicit Vec(A value) : native(value - Native{}) {}
  template <class Other>
    requires std::is_arithmetic_v<Other> && (!std::is_same_v<Other, A>)
  FASTBN_INLINE explicit Vec(Other value) : Vec(A(value)) {}

  FASTBN_INLINE Vec& operator+=(Vec other) {
    native += other.native;
    return *this;
  }
};

// clang-format off
template <class A> FASTBN_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) { return a.native + b.native; }
template <class A> FASTBN_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) { return a.native - b.native; }
template <class A> FASTBN_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) { return a.native * b.native; }
template <class A> FASTBN_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) { return a.native / b.native; }
template <class A> FASTBN_INLINE Vec<A> operator-(Vec<A> a) { return -a.native; }
template <class A> FASTBN_INLINE Mask<A> operator<=(Vec<A> a, Vec<A> b) { return {a.native <= b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator>=(Vec<A> a, Vec<A> b) { return {a.native >= b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator<(Vec<A> a, Vec<A> b) { return {a.native < b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator>(Vec<A> a, Vec<A> b) { return {a.native > b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator|(Mask<A> a, Mask<A> b) { return {a.native | b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator!(Mask<A> a) { return {~a.native}; }
// clang-format on

template <class A>
FASTBN_INLINE Vec<A> select(Mask<A> mask, Vec<A> yes, Vec<A> no) {
#if defined(__AVX2__)
  return mask.native ? yes.native : no.native;
#else  // g++ 12 fails on a vector ?: for SSE2
  Vec<A> result;
  for (int i = 0; i < Vec<A>::lanes; ++i) result.native[i] = mask.native[i] ? yes.native[i] : no.native[i];
  return result;
#endif
}

template <class A, class Function>
FASTBN_INLINE Vec<A> map_lanes(Vec<A> x, Function function) {
  A lane[Vec<A>::lanes];
  std::memcpy(lane, &x.native, sizeof(lane));
  for (A& value : lane) value = function(value);
  std::memcpy(&x.native, lane, sizeof(lane));
  return x;
}
template <class A>
FASTBN_INLINE Vec<A> exp(Vec<A> x) {
  return map_lanes(x, [](A value) { return fastbn::exp(value); });
}
template <class A>
FASTBN_INLINE Vec<A> expm1(Vec<A> x) {
  return map_lanes(x, [](A value) { return fastbn::expm1(value); });
}
template <class A>
FASTBN_INLINE Vec<A> erf(Vec<A> x) {
  return map_lanes(x, [](A value) { return fastbn::erf(value); });
}

// The first (part 0) or the last (part 1) half of the lanes, as double.
FASTBN_INLINE Vec<double> widen(Vec<float> x, int part) {
  typedef float Half __attribute__((vector_size(vector_bytes / 2)));
  struct Halves {
    Half half[2];
  };
  return __builtin_convertvector(__builtin_bit_cast(Halves, x.native).half[part], Vec<double>::Native);
}

typedef uint16_t Half16 __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(vector_bytes)));

template <class T>
FASTBN_INLINE Vec<acc_t<T>> load(const T* source) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    Vec<A> result;
    std::memcpy(&result.native, source, vector_bytes);
    return result;
  } else {
    Half16 half;
    std::memcpy(&half, source, sizeof(half));
    if constexpr (std::is_same_v<T, bfloat16>) {
      return __builtin_bit_cast(Vec<float>::Native, __builtin_convertvector(half, Bits32) << 16);
    } else {
#if defined(__AVX512F__)
      return __builtin_bit_cast(Vec<float>::Native, _mm512_cvtph_ps(__builtin_bit_cast(__m256i, half)));
#elif defined(__AVX2__) && defined(__F16C__)
      return __builtin_bit_cast(Vec<float>::Native, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, half)));
#else
      Vec<float> result;
      for (int i = 0; i < Vec<float>::lanes; ++i) result.native[i] = to_acc(float16{half[i]});
      return result;
#endif
    }
  }
}

template <class T>
FASTBN_INLINE void store(T* target, Vec<acc_t<T>> x) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(target, &x.native, vector_bytes);
  } else {
    Half16 half;
    if constexpr (std::is_same_v<T, bfloat16>) {
      const Bits32 bits = __builtin_bit_cast(Bits32, x.native);
      const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const auto is_nan = __builtin_bit_cast(Bits32, x.native != x.native);
      half = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Half16);
    } else {
#if defined(__AVX512F__)
      half =
          __builtin_bit_cast(Half16, _mm512_cvtps_ph(__builtin_bit_cast(__m512, x.native), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
      half =
          __builtin_bit_cast(Half16, _mm256_cvtps_ph(__builtin_bit_cast(__m256, x.native), _MM_FROUND_TO_NEAREST_INT));
#else
      for (int i = 0; i < Vec<float>::lanes; ++i) half[i] = from_acc<float16>(float(x.native[i])).bits;
#endif
    }
    std::memcpy(target, &half, sizeof(half));
  }
}

// Lane i of a mask is bit i.
template <class A>
FASTBN_INLINE uint64_t to_bits(Mask<A> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask(__builtin_bit_cast(__m512i, mask.native));
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask(__builtin_bit_cast(__m512i, mask.native));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return uint32_t(_mm256_movemask_ps(__builtin_bit_cast(__m256, mask.native)));
  if constexpr (sizeof(A) == 8) return uint32_t(_mm256_movemask_pd(__builtin_bit_cast(__m256d, mask.native)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < Vec<A>::lanes; ++i) bits |= uint64_t(mask.native[i] & 1) << i;
  return bits;
#endif
}

template <class A>
FASTBN_INLINE Mask<A> from_bits(uint64_t bits) {
  using Native = typename Mask<A>::Native;
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
#if defined(__AVX2__)
  Native lane_bit;
  for (int i = 0; i < Vec<A>::lanes; ++i) lane_bit[i] = Lane(1) << i;
  return {((Native{} + Lane(bits)) & lane_bit) != 0};
#else
  Native mask;
  for (int i = 0; i < Vec<A>::lanes; ++i) mask[i] = -Lane((bits >> i) & 1);
  return {mask};
#endif
}

// The first `count` elements; the other lanes are `fill`.
template <class T>
FASTBN_INLINE Vec<acc_t<T>> load_some(const T* source, int64_t count, Vec<acc_t<T>> fill) {
  T lane[Vec<acc_t<T>>::lanes] = {};
  std::memcpy(lane, source, size_t(count) * sizeof(T));
  return select(from_bits<acc_t<T>>((uint64_t(1) << count) - 1), load(lane), fill);
}

template <class T>
FASTBN_INLINE void store_some(T* target, int64_t count, Vec<acc_t<T>> x) {
  T lane[Vec<acc_t<T>>::lanes];
  store(lane, x);
  std::memcpy(target, lane, size_t(count) * sizeof(T));
}

// As many as `count` says, up to a vector.
template <class T>
FASTBN_INLINE Vec<acc_t<T>> load_up_to(const T* source, int64_t count) {
  return count == Vec<acc_t<T>>::lanes ? load(source) : load_some(source, count, Vec<acc_t<T>>(0));
}

template <class T>
FASTBN_INLINE void store_up_to(T* target, int64_t count, Vec<acc_t<T>> x) {
  count == Vec<acc_t<T>>::lanes ? store(target, x) : store_some(target, count, x);
}

}  // namespace fastbn::cpu::FASTBN_ISA
