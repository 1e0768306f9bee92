// Conversions of vectors: float to double, half types to float and back, masks to bits and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/vec.h"
#include "math/types.h"

namespace fastbn::cpu::FASTBN_ISA {

// Intrinsics are used where they exist, since g++ 12 assembles generic conversions of full vectors from halves. Forms
// with a mask of all lanes are used where g++ warns about the plain ones.
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

// Converts the first (0) or second (1) half of a register's lanes to double.
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

// Converts the first (0) or second (1) half of a vector's lanes to double.
FASTBN_INLINE Vec<double> widen(const Vec<float>& x, int half) {
  Vec<double> wide;
  for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
    const int at = half * parts + i;
    wide.part[i] = widen_half(x.part[at / 2], at % 2);
  });
  return wide;
}

// Loads a vector of double from floats.
FASTBN_INLINE Vec<double> load_as_double(const float* source) {
  Vec<double> wide;
  for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
    HalfFloats half;
    std::memcpy(&half, source + i * Vec<double>::part_lanes, sizeof(half));
    wide.part[i] = to_double(half);
  });
  return wide;
}

// True if the elements of T alternate between a vector's registers instead of filling one after the other: a vector of
// bfloat16 that has two registers holds the even elements in the first and the odd ones in the second. That takes a
// shift and a mask, whereas elements in order would have to move between lanes. So the order of lanes depends on T.
template <class T>
constexpr bool interleaved = std::is_same_v<T, bfloat16> && parts == 2;

// Returns the index of the element in a lane of a part.
template <class T>
constexpr int element_at(int part, int lane) {
  return interleaved<T> ? parts * lane + part : part * Vec<acc_t<T>>::part_lanes + lane;
}

#if defined(__AVX512F__)
// Permutes the lanes of a vector of two registers; `from` has the source lane, counted through both, of each lane.
FASTBN_INLINE Vec<float> permute(const Vec<float>& x, const __m512i (&from)[2]) {
  Vec<float> permuted;
  for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
    permuted.part[i] = (Floats)_mm512_permutex2var_ps((__m512)x.part[0], from[i], (__m512)x.part[parts - 1]);
  });
  return permuted;
}
#endif

// Convert from memory order to T's order of lanes, and back.
template <class T>
FASTBN_INLINE Vec<acc_t<T>> to_order_of(const Vec<acc_t<T>>& x) {
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    return permute(x, {_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                       _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)});
  }
#elif defined(__AVX2__)
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
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    return permute(x, {_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                       _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)});
  }
#elif defined(__AVX2__)
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

// Returns the mask as bits: bit i is element i.
template <class T>
FASTBN_INLINE uint64_t to_bits(const Mask<acc_t<T>>& mask) {
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    const __m512i even = _mm512_maskz_set1_epi32(mask.part[0], 0x8000);
    return _mm512_movepi16_mask(_mm512_mask_or_epi32(even, mask.part[1], even, _mm512_set1_epi32(int(0x80000000))));
  } else {
    uint64_t bits = 0;
    for_each_part([&](auto i)
                      FASTBN_INLINE_LAMBDA { bits |= uint64_t(mask.part[i]) << i * Vec<acc_t<T>>::part_lanes; });
    return bits;
  }
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

// Returns the mask whose element i is bit i.
template <class T>
FASTBN_INLINE Mask<acc_t<T>> from_bits(uint64_t bits) {
  using Native = typename Mask<acc_t<T>>::Native;
  Mask<acc_t<T>> mask;
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    const __m512i words = _mm512_movm_epi16(__mmask32(bits));
    mask.part[0] = _mm512_test_epi32_mask(words, _mm512_set1_epi32(1));
    mask.part[1] = _mm512_movepi32_mask(words);
  } else {
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { mask.part[i] = Native(bits >> i * Vec<acc_t<T>>::part_lanes); });
  }
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

// The half-type elements for one register of float, in memory order.
typedef uint16_t Halves __attribute__((vector_size(register_bytes / 2)));

// Without instructions for float16, its conversions are out of line: inlined, they were half of the portable loops'
// code.
#if !defined(__AVX512F__) && !(defined(__AVX2__) && defined(__F16C__))
__attribute__((noinline)) inline void unpack_float16(const Halves& stored, Floats& x) {
  for (int i = 0; i < Vec<float>::part_lanes; ++i) x[i] = to_acc(float16{stored[i]});
}
__attribute__((noinline)) inline void pack_float16(const Floats& x, Halves& half) {
  for (int i = 0; i < Vec<float>::part_lanes; ++i) half[i] = from_acc<float16>(float(x[i])).bits;
}
#endif

// Converts half types to float.
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
    unpack_float16(stored, x);
    return x;
#endif
  }
}

// Rounds to bfloat16 in the upper half of each lane, ties to even. The lower half is unspecified.
FASTBN_INLINE Words rounded_to_bfloat16(Floats x) {
  const Words bits = __builtin_bit_cast(Words, x);
#if defined(__AVX512F__)
  const __mmask16 is_odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  const __m512i up = (__m512i)(bits + 0x7fffu);
  const __m512i rounded = _mm512_mask_add_epi32(up, is_odd, up, _mm512_set1_epi32(1));
  return (Words)_mm512_mask_set1_epi32(rounded, compare<_CMP_UNORD_Q>(x, x), 0x7fc00000);
#else
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = Words{} + 0x7fc00000u;
  return __builtin_bit_cast(Words,
                            select_lanes(x != x, __builtin_bit_cast(Floats, nan), __builtin_bit_cast(Floats, rounded)));
#endif
}

// Rounds floats to a half type.
template <class T>
FASTBN_INLINE Halves pack(Floats x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BF16__)
    // This instruction rounds to nearest even too, but flushes subnormals to zero.
    return __builtin_bit_cast(Halves, _mm512_cvtneps_pbh((__m512)x));
#elif defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)(rounded_to_bfloat16(x) >> 16));
#else
    return __builtin_convertvector(rounded_to_bfloat16(x) >> 16, Halves);
#endif
  } else {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Halves, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    return __builtin_bit_cast(Halves, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    Halves half;
    pack_float16(x, half);
    return half;
#endif
  }
}

// Converts a register of bfloat16 to an interleaved vector of float, and back.
FASTBN_INLINE Vec<float> unpack_interleaved(Words stored) {
  Vec<float> x;
  x.part[0] = __builtin_bit_cast(Floats, stored << 16);
  x.part[parts - 1] = __builtin_bit_cast(Floats, stored & 0xffff0000u);
  return x;
}
FASTBN_INLINE Words pack_interleaved([[maybe_unused]] const Vec<float>& x) {
#if defined(__AVX512BF16__)
  const __m512i halves = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh((__m512)x.part[1], (__m512)x.part[0]));
  const Words index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (Words)_mm512_permutexvar_epi16((__m512i)(index * 0x10001u + 0x100000u), halves);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const Words even = rounded_to_bfloat16(x.part[0]) >> 16, odd = rounded_to_bfloat16(x.part[parts - 1]);
  return (Words)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  return Words{};  // other instruction sets do not interleave
#endif
}

}  // namespace fastbn::cpu::FASTBN_ISA
