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
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, vector_registers = 16;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
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

// Only FASTBN_INLINE functions take Vec and Mask, so no calling convention for wide vectors is involved. AVX-512 has
// registers of bits for masks, elsewhere all bits of a lane say yes or no.
template <class A>
struct Mask {
#if defined(__AVX512F__)
  using Native = std::conditional_t<sizeof(A) == 4, uint16_t, uint8_t>;
#else
  using Native = typename NativeVectors<A>::Masks;
#endif
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
  requires std::is_arithmetic_v<Other> &&(!std::is_same_v<Other, A>)FASTBN_INLINE explicit Vec(Other value)
      : Vec(A(value)) {}

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
template <class A> FASTBN_INLINE Mask<A> operator|(Mask<A> a, Mask<A> b) { return {typename Mask<A>::Native(a.native | b.native)}; }
template <class A> FASTBN_INLINE Mask<A> operator!(Mask<A> a) { return {typename Mask<A>::Native(~a.native)}; }
#if defined(__AVX512F__)
template <int predicate> FASTBN_INLINE Mask<float> compare(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask((__m512)a.native, (__m512)b.native, predicate)}; }
template <int predicate> FASTBN_INLINE Mask<double> compare(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask((__m512d)a.native, (__m512d)b.native, predicate)}; }
template <class A> FASTBN_INLINE Mask<A> operator<=(Vec<A> a, Vec<A> b) { return compare<_CMP_LE_OQ>(a, b); }
template <class A> FASTBN_INLINE Mask<A> operator>=(Vec<A> a, Vec<A> b) { return compare<_CMP_GE_OQ>(a, b); }
template <class A> FASTBN_INLINE Mask<A> operator<(Vec<A> a, Vec<A> b) { return compare<_CMP_LT_OQ>(a, b); }
template <class A> FASTBN_INLINE Mask<A> operator>(Vec<A> a, Vec<A> b) { return compare<_CMP_GT_OQ>(a, b); }
FASTBN_INLINE Vec<float> select(Mask<float> mask, Vec<float> yes, Vec<float> no) { return (Vec<float>::Native)_mm512_mask_blend_ps(mask.native, (__m512)no.native, (__m512)yes.native); }
FASTBN_INLINE Vec<double> select(Mask<double> mask, Vec<double> yes, Vec<double> no) { return (Vec<double>::Native)_mm512_mask_blend_pd(mask.native, (__m512d)no.native, (__m512d)yes.native); }
#else
template <class A> FASTBN_INLINE Mask<A> operator<=(Vec<A> a, Vec<A> b) { return {a.native <= b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator>=(Vec<A> a, Vec<A> b) { return {a.native >= b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator<(Vec<A> a, Vec<A> b) { return {a.native < b.native}; }
template <class A> FASTBN_INLINE Mask<A> operator>(Vec<A> a, Vec<A> b) { return {a.native > b.native}; }
#endif
// clang-format on

#if !defined(__AVX512F__)
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
#endif

// Conversions are by intrinsics where there are any: g++ 12 puts those of whole vectors together from halves. The forms
// with a mask of all lanes are those that it does not warn of.
typedef float HalfVec __attribute__((vector_size(vector_bytes / 2)));

FASTBN_INLINE Vec<double> to_double(HalfVec x) {
#if defined(__AVX512F__)
  return (Vec<double>::Native)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
#elif defined(__AVX2__)
  return (Vec<double>::Native)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Vec<double>::Native);
#endif
}

// The first (part 0) or the last (part 1) half of the lanes, as double.
FASTBN_INLINE Vec<double> widen(Vec<float> x, int part) {
#if defined(__AVX512F__)
  return to_double((HalfVec)(part == 0 ? _mm512_castps512_ps256((__m512)x.native)
                                       : _mm512_maskz_extractf32x8_ps(0xff, (__m512)x.native, 1)));
#elif defined(__AVX2__)
  return to_double(
      (HalfVec)(part == 0 ? _mm256_castps256_ps128((__m256)x.native) : _mm256_extractf128_ps((__m256)x.native, 1)));
#else
  struct Halves {
    HalfVec half[2];
  };
  return to_double(__builtin_bit_cast(Halves, x.native).half[part]);
#endif
}

FASTBN_INLINE Vec<double> load_as_double(const float* source) {
  HalfVec half;
  std::memcpy(&half, source, sizeof(half));
  return to_double(half);
}

// Lane i of a mask is bit i.
template <class A>
FASTBN_INLINE uint64_t to_bits(Mask<A> mask) {
#if defined(__AVX512F__)
  return mask.native;
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
#if defined(__AVX512F__)
  return {Native(bits)};
#else
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Native mask;
#if defined(__AVX2__)
  for (int i = 0; i < Vec<A>::lanes; ++i) mask[i] = Lane(1) << i;
  mask = ((Native{} + Lane(bits)) & mask) == mask;
#else  // g++ 12 fails on a comparison of 64-bit lanes for SSE2
  for (int i = 0; i < Vec<A>::lanes; ++i) mask[i] = -Lane((bits >> i) & 1);
#endif
  return {mask};
#endif
}

// What a T is in memory: a vector of A, or half as many bytes.
typedef uint16_t Half16 __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(vector_bytes)));
template <class T>
using Stored = std::conditional_t<sizeof(T) == 2, Half16, typename Vec<acc_t<T>>::Native>;

template <class T>
FASTBN_INLINE Vec<acc_t<T>> unpack(Stored<T> stored) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return stored;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512F__)
    const Bits32 bits = (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)stored);
#elif defined(__AVX2__)
    const Bits32 bits = (Bits32)_mm256_cvtepu16_epi32((__m128i)stored);
#else
    const Bits32 bits = __builtin_convertvector(stored, Bits32);
#endif
    return __builtin_bit_cast(Vec<float>::Native, bits << 16);
  } else {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Vec<float>::Native, _mm512_cvtph_ps(__builtin_bit_cast(__m256i, stored)));
#elif defined(__AVX2__) && defined(__F16C__)
    return __builtin_bit_cast(Vec<float>::Native, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, stored)));
#else
    Vec<float> result;
    for (int i = 0; i < Vec<float>::lanes; ++i) result.native[i] = to_acc(float16{stored[i]});
    return result;
#endif
  }
}

template <class T>
FASTBN_INLINE Stored<T> pack(Vec<acc_t<T>> x) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return x.native;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const Bits32 bits = __builtin_bit_cast(Bits32, x.native);
#if defined(__AVX512F__)
    const __mmask16 is_odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
    const __m512i up = (__m512i)(bits + 0x7fffu);
    const __m512i rounded = _mm512_srli_epi32(_mm512_mask_add_epi32(up, is_odd, up, _mm512_set1_epi32(1)), 16);
    const __mmask16 is_nan = compare<_CMP_UNORD_Q>(x, x).native;
    return (Half16)_mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, is_nan, 0x7fc0));
#elif defined(__AVX2__)
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const __m256 is_nan = _mm256_cmp_ps((__m256)x.native, (__m256)x.native, _CMP_UNORD_Q);
    const __m256i half = (__m256i)_mm256_blendv_ps((__m256)rounded, (__m256)_mm256_set1_epi32(0x7fc0), is_nan);
    return (Half16)_mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
#else
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto is_nan = __builtin_bit_cast(Bits32, x.native != x.native);
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Half16);
#endif
  } else {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Half16, _mm512_cvtps_ph((__m512)x.native, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    return __builtin_bit_cast(Half16, _mm256_cvtps_ph((__m256)x.native, _MM_FROUND_TO_NEAREST_INT));
#else
    Half16 half;
    for (int i = 0; i < Vec<float>::lanes; ++i) half[i] = from_acc<float16>(float(x.native[i])).bits;
    return half;
#endif
  }
}

// Which lanes of a vector are elements of a row that were not visited yet: all, or at the end of the row `count`. Those
// are the last ones of a vector that overlaps the one before it, or in a row shorter than a vector, the first ones.
// Where AVX-512 loads and stores any lanes at once, they are always the first.
template <class A>
struct AllLanes {
  static constexpr int count = Vec<A>::lanes, first = 0;
};
template <class A>
struct EndLanes {
  int count, first;

  FASTBN_INLINE bool overlaps() const { return first > 0; }
  FASTBN_INLINE uint32_t bits() const { return ((1u << count) - 1) << first; }
};

#if defined(__AVX512F__)
constexpr bool overlaps_at_ends = false;
#else
constexpr bool overlaps_at_ends = true;
#endif

// visit(column, lanes) at the end of a row of `cols` columns, none of which is a whole number of vectors.
template <class A, class Visit>
FASTBN_INLINE void visit_end(int64_t cols, Visit&& visit) {
  const int count = int(cols % Vec<A>::lanes);
  const int first = overlaps_at_ends && cols > count ? Vec<A>::lanes - count : 0;
  visit(cols - count - first, EndLanes<A>{count, first});
}

template <class A>
FASTBN_INLINE Vec<A> keep(AllLanes<A>, Vec<A> x, Vec<A>) {
  return x;
}
template <class A>
FASTBN_INLINE Vec<A> keep(EndLanes<A> lanes, Vec<A> x, Vec<A> others) {
  return select(from_bits<A>(lanes.bits()), x, others);
}

// Copies fewer elements than a vector has by powers of two, each of which is one move.
template <class T>
FASTBN_INLINE void copy_some(T* target, const T* source, int count) {
  int done = 0;
  for (int piece = Vec<acc_t<T>>::lanes / 2; piece > 0; piece /= 2) {
    if (!(count & piece)) continue;
    std::memcpy(target + done, source + done, size_t(piece) * sizeof(T));
    done += piece;
  }
}

template <class T>
FASTBN_INLINE Vec<acc_t<T>> load(const T* source, AllLanes<acc_t<T>> = {}) {
  Stored<T> stored;
  std::memcpy(&stored, source, sizeof(stored));
  return unpack<T>(stored);
}
// The lanes beyond a row shorter than a vector are 0.
template <class T>
FASTBN_INLINE Vec<acc_t<T>> load(const T* source, EndLanes<acc_t<T>> lanes) {
#if defined(__AVX512F__)
  const uint32_t bits = lanes.bits();
  if constexpr (sizeof(T) == 2) return unpack<T>((Half16)_mm256_maskz_loadu_epi16(__mmask16(bits), source));
  if constexpr (sizeof(T) == 4) return (Stored<T>)_mm512_maskz_loadu_ps(__mmask16(bits), source);
  if constexpr (sizeof(T) == 8) return (Stored<T>)_mm512_maskz_loadu_pd(__mmask8(bits), source);
#else
  if (lanes.overlaps()) return load(source);
  T lane[Vec<acc_t<T>>::lanes] = {};
  copy_some(lane, source, lanes.count);
  return load(lane);
#endif
}

template <class T>
FASTBN_INLINE void store(T* target, Vec<acc_t<T>> x, AllLanes<acc_t<T>> = {}) {
  const Stored<T> stored = pack<T>(x);
  std::memcpy(target, &stored, sizeof(stored));
}
template <class T>
FASTBN_INLINE void store(T* target, Vec<acc_t<T>> x, EndLanes<acc_t<T>> lanes) {
#if defined(__AVX512F__)
  const uint32_t bits = lanes.bits();
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(target, __mmask16(bits), (__m256i)pack<T>(x));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(target, __mmask16(bits), (__m512)x.native);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(target, __mmask8(bits), (__m512d)x.native);
#else
  if (lanes.overlaps()) return store(target, x);
  T lane[Vec<acc_t<T>>::lanes];
  store(lane, x);
  copy_some(target, lane, lanes.count);
#endif
}

// Whether a vector in memory is a cache line, which can then be stored past the caches at once. Halves of lines are
// not: ops on 16x128x56x56 bfloat16 took 1.0 to 2.2 times as long so in channels_last, and 0.96 to 1.05 times
// contiguous.
template <class T>
#if defined(__AVX512F__)
constexpr bool fills_line = sizeof(Stored<T>) == 64;
#else
constexpr bool fills_line = false;
#endif

// To the address of a line, past the caches; other threads see it after finish_streaming().
template <class T>
FASTBN_INLINE void stream(T* target, Vec<acc_t<T>> x) {
#if defined(__AVX512F__)
  if constexpr (fills_line<T>) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)pack<T>(x));
#endif
}

FASTBN_INLINE void finish_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace fastbn::cpu::FASTBN_ISA
