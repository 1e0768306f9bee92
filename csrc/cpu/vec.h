// Vectors of float or double on the compilers' vector extensions, for the instruction set that the including file is
// compiled for. They have the operators and functions that csrc/math asks of an F, so formulas are written once.
//
// Under AVX2 a vector is two registers, so that one of float is a cache line there too: of rows that lie a stride
// apart, lines that are visited by halves have often left L1 in between. And one of bfloat16 has the elements at even
// places in its first register and those at odd places in the second, which takes a shift and a mask, where elements in
// order have to be moved between lanes. So each T has an order of lanes.
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
constexpr int register_bytes = 64, register_count = 32, parts = 1;
#elif defined(__AVX2__)
constexpr int register_bytes = 32, register_count = 16, parts = 2;
#else
constexpr int register_bytes = 16, register_count = 16, parts = 1;
#endif

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
using Floats = NativeVectors<float>::Values;
using Doubles = NativeVectors<double>::Values;
using Words = NativeVectors<uint32_t>::Values;

// Only FASTBN_INLINE functions take these and Vec and Mask, so no calling convention for wide vectors is involved.
// AVX-512 has registers of bits for masks, elsewhere all bits of a lane say yes or no.
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
    for (Native& values : part) values = value - Native{};
  }
  template <class Other>
  requires std::is_arithmetic_v<Other> &&(!std::is_same_v<Other, A>)FASTBN_INLINE explicit Vec(Other value)
      : Vec(A(value)) {}

  FASTBN_INLINE Vec& operator+=(const Vec& other) {
    for (int i = 0; i < parts; ++i) part[i] += other.part[i];
    return *this;
  }
};

// What a function makes of each part of the arguments.
template <class Result, class Function, class... Arguments>
FASTBN_INLINE Result by_parts(Function&& function, const Arguments&... arguments) {
  Result result;
  for (int i = 0; i < parts; ++i) result.part[i] = function(arguments.part[i]...);
  return result;
}

template <class To, class From>
FASTBN_INLINE Vec<To> bit_cast_lanes(const Vec<From>& x) {
  return by_parts<Vec<To>>([](auto a) FASTBN_INLINE_LAMBDA { return __builtin_bit_cast(typename Vec<To>::Native, a); },
                           x);
}

// clang-format off
template <class A> FASTBN_INLINE Vec<A> operator+(Vec<A> a, const Vec<A>& b) { for (int i = 0; i < parts; ++i) a.part[i] += b.part[i]; return a; }
template <class A> FASTBN_INLINE Vec<A> operator-(Vec<A> a, const Vec<A>& b) { for (int i = 0; i < parts; ++i) a.part[i] -= b.part[i]; return a; }
template <class A> FASTBN_INLINE Vec<A> operator*(Vec<A> a, const Vec<A>& b) { for (int i = 0; i < parts; ++i) a.part[i] *= b.part[i]; return a; }
template <class A> FASTBN_INLINE Vec<A> operator/(Vec<A> a, const Vec<A>& b) { for (int i = 0; i < parts; ++i) a.part[i] /= b.part[i]; return a; }
template <class A> FASTBN_INLINE Vec<A> operator-(Vec<A> a) { for (auto& values : a.part) values = -values; return a; }
template <class A> FASTBN_INLINE Vec<A> operator<<(Vec<A> a, int bits) { for (auto& values : a.part) values = values << bits; return a; }
template <class A> FASTBN_INLINE Vec<A> operator>>(Vec<A> a, int bits) { for (auto& values : a.part) values = values >> bits; return a; }
template <class A> FASTBN_INLINE Mask<A> operator|(Mask<A> a, const Mask<A>& b) { for (int i = 0; i < parts; ++i) a.part[i] |= b.part[i]; return a; }
template <class A> FASTBN_INLINE Mask<A> operator!(Mask<A> a) { for (auto& lanes : a.part) lanes = typename Mask<A>::Native(~lanes); return a; }
#if defined(__AVX512F__)
template <int predicate> FASTBN_INLINE uint16_t compare(Floats a, Floats b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, predicate); }
template <int predicate> FASTBN_INLINE uint8_t compare(Doubles a, Doubles b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, predicate); }
template <class A> FASTBN_INLINE Mask<A> operator<=(const Vec<A>& a, const Vec<A>& b) { return {compare<_CMP_LE_OQ>(a.part[0], b.part[0])}; }
template <class A> FASTBN_INLINE Mask<A> operator>=(const Vec<A>& a, const Vec<A>& b) { return {compare<_CMP_GE_OQ>(a.part[0], b.part[0])}; }
template <class A> FASTBN_INLINE Mask<A> operator<(const Vec<A>& a, const Vec<A>& b) { return {compare<_CMP_LT_OQ>(a.part[0], b.part[0])}; }
template <class A> FASTBN_INLINE Mask<A> operator>(const Vec<A>& a, const Vec<A>& b) { return {compare<_CMP_GT_OQ>(a.part[0], b.part[0])}; }
FASTBN_INLINE Floats select_lanes(uint16_t mask, Floats yes, Floats no) { return (Floats)_mm512_mask_blend_ps(mask, (__m512)no, (__m512)yes); }
FASTBN_INLINE Doubles select_lanes(uint8_t mask, Doubles yes, Doubles no) { return (Doubles)_mm512_mask_blend_pd(mask, (__m512d)no, (__m512d)yes); }
#else
template <class A> FASTBN_INLINE Mask<A> operator<=(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for (int i = 0; i < parts; ++i) m.part[i] = a.part[i] <= b.part[i]; return m; }
template <class A> FASTBN_INLINE Mask<A> operator>=(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for (int i = 0; i < parts; ++i) m.part[i] = a.part[i] >= b.part[i]; return m; }
template <class A> FASTBN_INLINE Mask<A> operator<(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for (int i = 0; i < parts; ++i) m.part[i] = a.part[i] < b.part[i]; return m; }
template <class A> FASTBN_INLINE Mask<A> operator>(const Vec<A>& a, const Vec<A>& b) { Mask<A> m; for (int i = 0; i < parts; ++i) m.part[i] = a.part[i] > b.part[i]; return m; }
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

// Conversions are by intrinsics where there are any: g++ 12 puts those of whole vectors together from halves. The forms
// with a mask of all lanes are those that it does not warn of.
typedef float HalfFloats __attribute__((vector_size(register_bytes / 2)));

FASTBN_INLINE Doubles to_double(HalfFloats x) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Doubles);
#endif
}

// The first (0) or the last (1) half of a register's lanes, as double.
FASTBN_INLINE Doubles widen_half(Floats x, int half) {
#if defined(__AVX512F__)
  return to_double(
      (HalfFloats)(half == 0 ? _mm512_castps512_ps256((__m512)x) : _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1)));
#elif defined(__AVX2__)
  return to_double((HalfFloats)(half == 0 ? _mm256_castps256_ps128((__m256)x) : _mm256_extractf128_ps((__m256)x, 1)));
#else
  struct Halves {
    HalfFloats half[2];
  };
  return to_double(__builtin_bit_cast(Halves, x).half[half]);
#endif
}

// Likewise of a vector's lanes.
FASTBN_INLINE Vec<double> widen(const Vec<float>& x, int half) {
  Vec<double> wide;
  for (int i = 0; i < parts; ++i) {
    const int at = half * parts + i;
    wide.part[i] = widen_half(x.part[at / 2], at % 2);
  }
  return wide;
}

FASTBN_INLINE Vec<double> load_as_double(const float* source) {
  Vec<double> wide;
  for (int i = 0; i < parts; ++i) {
    HalfFloats half;
    std::memcpy(&half, source + i * Vec<double>::part_lanes, sizeof(half));
    wide.part[i] = to_double(half);
  }
  return wide;
}

// Whether a T's elements take turns between a vector's parts, instead of filling one after the other.
template <class T>
constexpr bool interleaved = std::is_same_v<T, bfloat16>&& parts == 2;

// The element that a lane of a part holds.
template <class T>
constexpr int element_at(int part, int lane) {
  return interleaved<T> ? parts * lane + part : part * Vec<acc_t<T>>::part_lanes + lane;
}

// From the order of memory to a T's order, and back.
template <class T>
FASTBN_INLINE Vec<acc_t<T>> to_order_of(const Vec<acc_t<T>>& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    const __m256 a = (__m256)x.part[0], b = (__m256)x.part[1];
    Vec<float> ordered;
    ordered.part[0] = (Floats)_mm256_permute4x64_pd((__m256d)_mm256_shuffle_ps(a, b, 0x88), 0xd8);
    ordered.part[1] = (Floats)_mm256_permute4x64_pd((__m256d)_mm256_shuffle_ps(a, b, 0xdd), 0xd8);
    return ordered;
  }
#endif
  return x;
}
template <class T>
FASTBN_INLINE Vec<acc_t<T>> from_order_of(const Vec<acc_t<T>>& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    const __m256 even = (__m256)x.part[0], odd = (__m256)x.part[1];
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    Vec<float> ordered;
    ordered.part[0] = (Floats)_mm256_permute2f128_ps(low, high, 0x20);
    ordered.part[1] = (Floats)_mm256_permute2f128_ps(low, high, 0x31);
    return ordered;
  }
#endif
  return x;
}

// Element i of a mask is bit i.
template <class T>
FASTBN_INLINE uint64_t to_bits(const Mask<acc_t<T>>& mask) {
#if defined(__AVX512F__)
  return mask.part[0];
#elif defined(__AVX2__)
  if constexpr (interleaved<T>) {
    const __m256i words = _mm256_blend_epi16((__m256i)mask.part[0], (__m256i)mask.part[1], 0xaa);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return uint32_t(_mm_movemask_epi8(bytes));
  } else if constexpr (sizeof(acc_t<T>) == 4) {
    return uint32_t(_mm256_movemask_ps((__m256)mask.part[0]) | _mm256_movemask_ps((__m256)mask.part[1]) << 8);
  } else {
    return uint32_t(_mm256_movemask_pd((__m256d)mask.part[0]) | _mm256_movemask_pd((__m256d)mask.part[1]) << 4);
  }
#else
  uint64_t bits = 0;
  for (int i = 0; i < Vec<acc_t<T>>::lanes; ++i) bits |= uint64_t(mask.part[0][i] & 1) << i;
  return bits;
#endif
}

template <class T>
FASTBN_INLINE Mask<acc_t<T>> from_bits(uint64_t bits) {
  using Native = typename Mask<acc_t<T>>::Native;
  Mask<acc_t<T>> mask;
#if defined(__AVX512F__)
  mask.part[0] = Native(bits);
#else
  using Lane = std::conditional_t<sizeof(acc_t<T>) == 4, int32_t, int64_t>;
  for (int part = 0; part < parts; ++part) {
    Native& lanes = mask.part[part];
#if defined(__AVX2__)
    for (int i = 0; i < Vec<acc_t<T>>::part_lanes; ++i) lanes[i] = Lane(1) << element_at<T>(part, i);
    lanes = ((Native{} + Lane(bits)) & lanes) == lanes;
#else  // g++ 12 fails on a comparison of 64-bit lanes for SSE2
    for (int i = 0; i < Vec<acc_t<T>>::part_lanes; ++i) lanes[i] = -Lane((bits >> element_at<T>(part, i)) & 1);
#endif
  }
#endif
  return mask;
}

// Half types in the order of memory, a register of float at a time.
typedef uint16_t Halves __attribute__((vector_size(register_bytes / 2)));

template <class T>
FASTBN_INLINE Floats unpack(Halves stored) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512F__)
    const Words bits = (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)stored);
#elif defined(__AVX2__)
    const Words bits = (Words)_mm256_cvtepu16_epi32((__m128i)stored);
#else
    const Words bits = __builtin_convertvector(stored, Words);
#endif
    return __builtin_bit_cast(Floats, bits << 16);
  } else {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Floats, _mm512_cvtph_ps(__builtin_bit_cast(__m256i, stored)));
#elif defined(__AVX2__) && defined(__F16C__)
    return __builtin_bit_cast(Floats, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, stored)));
#else
    Floats x;
    for (int i = 0; i < Vec<float>::part_lanes; ++i) x[i] = to_acc(float16{stored[i]});
    return x;
#endif
  }
}

template <class T>
FASTBN_INLINE Halves pack(Floats x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const Words bits = __builtin_bit_cast(Words, x);
#if defined(__AVX512F__)
    const __mmask16 is_odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
    const __m512i up = (__m512i)(bits + 0x7fffu);
    const __m512i rounded = _mm512_srli_epi32(_mm512_mask_add_epi32(up, is_odd, up, _mm512_set1_epi32(1)), 16);
    const __mmask16 is_nan = compare<_CMP_UNORD_Q>(x, x);
    return (Halves)_mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, is_nan, 0x7fc0));
#else
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto is_nan = __builtin_bit_cast(Words, x != x);
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Halves);
#endif
  } else {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Halves, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    return __builtin_bit_cast(Halves, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    Halves half;
    for (int i = 0; i < Vec<float>::part_lanes; ++i) half[i] = from_acc<float16>(float(x[i])).bits;
    return half;
#endif
  }
}

// Which lanes of a vector are elements of a row that were not visited yet: all, or at the end of the row `count`. Those
// are the last ones of a vector that overlaps the one before it, or in a row shorter than a vector, the first ones.
// Where AVX-512 loads and stores any lanes at once, they are always the first.
template <class T>
struct AllLanes {
  static constexpr int count = Vec<acc_t<T>>::lanes, first = 0;
};
template <class T>
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

// visit(column, lanes) at the end of a row of `cols` columns that are not a whole number of vectors.
template <class T, class Visit>
FASTBN_INLINE void visit_end(int64_t cols, Visit&& visit) {
  constexpr int lanes = Vec<acc_t<T>>::lanes;
  const int count = int(cols % lanes);
  const int first = overlaps_at_ends && cols > count ? lanes - count : 0;
  visit(cols - count - first, EndLanes<T>{count, first});
}

template <class T>
FASTBN_INLINE Vec<acc_t<T>> keep(AllLanes<T>, const Vec<acc_t<T>>& x, const Vec<acc_t<T>>&) {
  return x;
}
template <class T>
FASTBN_INLINE Vec<acc_t<T>> keep(EndLanes<T> lanes, const Vec<acc_t<T>>& x, const Vec<acc_t<T>>& others) {
  return select(from_bits<T>(lanes.bits()), x, others);
}

// Copies fewer elements than a vector has by powers of two, each of which is one move.
template <int lanes, class T>
FASTBN_INLINE void copy_some(T* target, const T* source, int count) {
  int done = 0;
  for (int piece = lanes / 2; piece > 0; piece /= 2) {
    if (!(count & piece)) continue;
    std::memcpy(target + done, source + done, size_t(piece) * sizeof(T));
    done += piece;
  }
}

// Elements of T, or what belongs to each in an array of acc_t<T>, in the order of T.
template <class Source, class T>
FASTBN_INLINE Vec<acc_t<T>> load(const Source* source, AllLanes<T>) {
  using V = Vec<acc_t<T>>;
  V x;
  if constexpr (std::is_same_v<Source, acc_t<T>>) {
    for (int i = 0; i < parts; ++i) std::memcpy(&x.part[i], source + i * V::part_lanes, register_bytes);
    return to_order_of<T>(x);
  } else if constexpr (interleaved<T>) {
    Words words;
    std::memcpy(&words, source, sizeof(words));
    x.part[0] = __builtin_bit_cast(Floats, words << 16);
    x.part[parts - 1] = __builtin_bit_cast(Floats, words & 0xffff0000u);
    return x;
  } else {
    for (int i = 0; i < parts; ++i) {
      Halves stored;
      std::memcpy(&stored, source + i * V::part_lanes, sizeof(stored));
      x.part[i] = unpack<T>(stored);
    }
    return x;
  }
}
// What belongs to the columns from `at` on in a table by planes, whose slack is what lanes beyond its last column hold.
template <class T, class Lanes>
FASTBN_INLINE Vec<acc_t<T>> load_planes(const acc_t<T>* table, int64_t plane, int64_t at, Lanes lanes) {
  if constexpr (interleaved<T>) {
    Vec<float> x;
    for (int i = 0; i < parts; ++i)
      std::memcpy(&x.part[i], table + (at + i) % 2 * plane + (at + i) / 2, register_bytes);
    return x;
  } else {
    return load(table + at, lanes);
  }
}
// The lanes beyond a row shorter than a vector are 0.
template <class Source, class T>
FASTBN_INLINE Vec<acc_t<T>> load(const Source* source, EndLanes<T> lanes) {
#if defined(__AVX512F__)
  const uint32_t bits = lanes.bits();
  Vec<acc_t<T>> x;
  if constexpr (sizeof(Source) == 2)
    x.part[0] = unpack<T>((Halves)_mm256_maskz_loadu_epi16(__mmask16(bits), source));
  else if constexpr (sizeof(Source) == 4)
    x.part[0] = (Floats)_mm512_maskz_loadu_ps(__mmask16(bits), source);
  else
    x.part[0] = (Doubles)_mm512_maskz_loadu_pd(__mmask8(bits), source);
  return x;
#else
  constexpr int all = Vec<acc_t<T>>::lanes;
  if (lanes.overlaps()) return load(source, AllLanes<T>{});
  Source lane[all] = {};
  copy_some<all>(lane, source, lanes.count);
  return load(lane, AllLanes<T>{});
#endif
}

template <class T>
FASTBN_INLINE void store(T* target, const Vec<acc_t<T>>& x, AllLanes<T> = {}) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    for (int i = 0; i < parts; ++i) std::memcpy(target + i * Vec<T>::part_lanes, &x.part[i], register_bytes);
  } else if constexpr (interleaved<T>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const auto rounded = by_parts<Vec<float>>(
        [](Floats part) FASTBN_INLINE_LAMBDA {
          const Words bits = __builtin_bit_cast(Words, part);
          const Floats up = __builtin_bit_cast(Floats, bits + 0x7fffu + ((bits >> 16) & 1u));
          const Floats nan = __builtin_bit_cast(Floats, Words{} + 0x7fc00000u);
          return part != part ? nan : up;
        },
        x);
    const Words even = __builtin_bit_cast(Words, rounded.part[0]) >> 16;
    const __m256i words = _mm256_blend_epi16((__m256i)even, (__m256i)rounded.part[1], 0xaa);
    std::memcpy(target, &words, sizeof(words));
#endif
  } else {
    for (int i = 0; i < parts; ++i) {
      const Halves stored = pack<T>(x.part[i]);
      std::memcpy(target + i * Vec<float>::part_lanes, &stored, sizeof(stored));
    }
  }
}
template <class T>
FASTBN_INLINE void store(T* target, const Vec<acc_t<T>>& x, EndLanes<T> lanes) {
#if defined(__AVX512F__)
  const uint32_t bits = lanes.bits();
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(target, __mmask16(bits), (__m256i)pack<T>(x.part[0]));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(target, __mmask16(bits), (__m512)x.part[0]);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(target, __mmask8(bits), (__m512d)x.part[0]);
#else
  constexpr int all = Vec<acc_t<T>>::lanes;
  if (lanes.overlaps()) return store(target, x);
  T lane[all];
  store(lane, x);
  copy_some<all>(target, lane, lanes.count);
#endif
}

// Whether a vector in memory is a cache line, which can then be stored past the caches at once. Halves of lines are
// not: ops on 16x128x56x56 bfloat16 took 1.0 to 2.2 times as long so in channels_last, and 0.96 to 1.05 times
// contiguous.
template <class T>
constexpr bool fills_line = register_bytes >= 32 && Vec<acc_t<T>>::lanes * sizeof(T) == 64;

// To the address of a line, past the caches; other threads see it after finish_streaming().
template <class T>
FASTBN_INLINE void stream([[maybe_unused]] T* target, [[maybe_unused]] const Vec<acc_t<T>>& x) {
  if constexpr (fills_line<T>) {
    for (int i = 0; i < parts; ++i) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target) + i, (__m512i)x.part[i]);
#elif defined(__AVX2__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i, (__m256i)x.part[i]);
#endif
    }
  }
}

FASTBN_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace fastbn::cpu::FASTBN_ISA
