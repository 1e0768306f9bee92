// Loads and stores of full vectors and of the elements at the end of a row.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/vec.h"
#include "cpu/simd/vec_convert.h"
#include "math/types.h"

namespace fastbn::cpu::FASTBN_ISA {

// The lanes of a vector that hold unvisited elements of a row: all of them, or `count` at the end of the row. With
// AVX-512, which loads and stores any subset of lanes, those are the first ones. Elsewhere they are the last ones of a
// vector that overlaps the one before it, or the first ones of a row that was padded to a vector (short_rows.h), and
// loads and stores are of all lanes.
template <class T>
struct AllLanes {
  static constexpr int count = Vec<acc_t<T>>::lanes, first = 0;
};
template <class T>
struct EndLanes {
  int count, first;

  FASTBN_INLINE uint32_t bits() const { return ((1u << count) - 1) << first; }
};

#if defined(__AVX512F__)
constexpr bool overlaps_at_ends = false;
#else
constexpr bool overlaps_at_ends = true;
#endif

// Calls `visit(column, lanes)` for the end of a row whose `cols` columns do not fill vectors.
template <class T, class Visit>
FASTBN_INLINE void visit_end(int64_t cols, Visit&& visit) {
  constexpr int lanes = Vec<acc_t<T>>::lanes;
  const int count = int(cols % lanes);
  const int first = overlaps_at_ends && cols > count ? lanes - count : 0;
  visit(cols - count - first, EndLanes<T>{count, first});
}

// Returns `x` in the given lanes and `others` elsewhere.
template <class T>
FASTBN_INLINE Vec<acc_t<T>> keep(AllLanes<T>, const Vec<acc_t<T>>& x, const Vec<acc_t<T>>&) {
  return x;
}
template <class T>
FASTBN_INLINE Vec<acc_t<T>> keep(EndLanes<T> lanes, const Vec<acc_t<T>>& x, const Vec<acc_t<T>>& others) {
  return select(from_bits<T>(lanes.bits()), x, others);
}

// Loads a register of 2-byte elements as stored. With AVX-512, lanes beyond a row are 0, here and below.
template <class Source>
FASTBN_INLINE Words load_register(const Source* source, AllLanes<bfloat16>) {
  static_assert(sizeof(Source) == 2);
  Words stored;
  std::memcpy(&stored, source, sizeof(stored));
  return stored;
}
template <class Source>
FASTBN_INLINE Words load_register(const Source* source, [[maybe_unused]] EndLanes<bfloat16> lanes) {
#if defined(__AVX512F__)
  static_assert(sizeof(Source) == 2);
  return (Words)_mm512_maskz_loadu_epi16(__mmask32(lanes.bits()), source);
#else
  return load_register(source, AllLanes<bfloat16>{});
#endif
}

// Loads elements of T, or the matching entries of an array of acc_t<T>, in T's order of lanes.
template <class Source, class T>
FASTBN_INLINE Vec<acc_t<T>> load(const Source* source, AllLanes<T>) {
  using V = Vec<acc_t<T>>;
  V x;
  if constexpr (std::is_same_v<Source, acc_t<T>>) {
    for_each_part([&](auto i)
                      FASTBN_INLINE_LAMBDA { std::memcpy(&x.part[i], source + i * V::part_lanes, register_bytes); });
    return to_order_of<T>(x);
  } else if constexpr (interleaved<T>) {
    return unpack_interleaved(load_register(source, AllLanes<T>{}));
  } else {
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
      Halves stored;
      std::memcpy(&stored, source + i * V::part_lanes, sizeof(stored));
      x.part[i] = unpack<T>(stored);
    });
    return x;
  }
}
// Loads the entries of the columns from `at` on from a table with planes. Lanes beyond its last column load its
// padding. Without AVX-512 every table is read so.
template <class T, class Lanes>
FASTBN_INLINE Vec<acc_t<T>> load_planes(const acc_t<T>* table, int64_t plane, int64_t at, Lanes lanes) {
  if constexpr (interleaved<T>) {
    Vec<float> x;
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
      std::memcpy(&x.part[i], table + (at + i) % 2 * plane + (at + i) / 2, register_bytes);
    });
    return x;
  } else {
    return load(table + at, lanes);
  }
}
// Loads the elements at the end of a row.
template <class Source, class T>
FASTBN_INLINE Vec<acc_t<T>> load(const Source* source, [[maybe_unused]] EndLanes<T> lanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Source) == 2 && interleaved<T>) {
    return unpack_interleaved(load_register(source, lanes));
  } else {
    using V = Vec<acc_t<T>>;
    V x;
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
      const uint32_t part_bits = lanes.bits() >> i * V::part_lanes;
      const Source* part = source + i * V::part_lanes;
      if constexpr (sizeof(Source) == 2)
        x.part[i] = unpack<T>((Halves)_mm256_maskz_loadu_epi16(__mmask16(part_bits), part));
      else if constexpr (sizeof(Source) == 4)
        x.part[i] = (Floats)_mm512_maskz_loadu_ps(__mmask16(part_bits), part);
      else
        x.part[i] = (Doubles)_mm512_maskz_loadu_pd(__mmask8(part_bits), part);
    });
    return to_order_of<T>(x);
  }
#else
  return load(source, AllLanes<T>{});
#endif
}

// Returns its argument, of whose origin the compiler then knows nothing. It would make one masked load of a load and a
// selection, for which processors do not prefetch: the backward after a mask of 12544x512 float32 took 1.9 times as
// long with masked loads, and that of 50176x64 1.7 times (EPYC 9005).
template <class Register>
FASTBN_INLINE Register opaque(Register x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Loads the elements whose bits are 1, and 0 for the others.
template <class T, template <class> class Lanes>
FASTBN_INLINE Vec<acc_t<T>> load_where(uint64_t bits, const T* source, Lanes<T> lanes) {
  constexpr bool is_full = std::is_same_v<Lanes<T>, AllLanes<T>>;
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) {
    if constexpr (!is_full)
      return unpack_interleaved((Words)_mm512_maskz_loadu_epi16(__mmask32(bits & lanes.bits()), source));
    else
      return unpack_interleaved((Words)_mm512_maskz_mov_epi16(__mmask32(bits), opaque(_mm512_loadu_si512(source))));
  }
#endif
  Vec<acc_t<T>> x = load(source, lanes);
  if constexpr (is_full) for_each_part([&](auto i) FASTBN_INLINE_LAMBDA { x.part[i] = opaque(x.part[i]); });
  return select(from_bits<T>(bits), x, Vec<acc_t<T>>(0));
}

// Stores a vector, rounded to T.
template <class T>
FASTBN_INLINE void store(T* target, const Vec<acc_t<T>>& x, AllLanes<T> = {}) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    for_each_part(
        [&](auto i) FASTBN_INLINE_LAMBDA { std::memcpy(target + i * Vec<T>::part_lanes, &x.part[i], register_bytes); });
  } else if constexpr (interleaved<T>) {
    const Words stored = pack_interleaved(x);
    std::memcpy(target, &stored, sizeof(stored));
  } else {
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
      const Halves stored = pack<T>(x.part[i]);
      std::memcpy(target + i * Vec<float>::part_lanes, &stored, sizeof(stored));
    });
  }
}
template <class T>
FASTBN_INLINE void store(T* target, const Vec<acc_t<T>>& x, [[maybe_unused]] EndLanes<T> lanes) {
#if defined(__AVX512F__)
  const uint32_t bits = lanes.bits();
  if constexpr (interleaved<T>)
    _mm512_mask_storeu_epi16(target, __mmask32(bits), (__m512i)pack_interleaved(x));
  else if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(target, __mmask16(bits), (__m256i)pack<T>(x.part[0]));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(target, __mmask16(bits), (__m512)x.part[0]);
  else
    _mm512_mask_storeu_pd(target, __mmask8(bits), (__m512d)x.part[0]);
#else
  store(target, x);
#endif
}

// True if a vector in memory is a full cache line, which non-temporal stores can then write at once. Half lines, as
// vectors of half types are elsewhere, do not qualify: with them, ops on 16x128x56x56 bfloat16 took 1.0 to 2.2 times as
// long in channels_last, and 0.96 to 1.05 times contiguous.
template <class T>
constexpr bool fills_line = register_bytes >= 32 && Vec<acc_t<T>>::lanes * sizeof(T) == 64;

// Stores a vector to an aligned cache line, non-temporally. Other threads see it after `finish_streaming()`.
template <class T>
FASTBN_INLINE void stream([[maybe_unused]] T* target, [[maybe_unused]] const Vec<acc_t<T>>& x) {
  if constexpr (fills_line<T> && interleaved<T>) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)pack_interleaved(x));
#endif
  } else if constexpr (fills_line<T>) {
    for_each_part([&](auto i) FASTBN_INLINE_LAMBDA {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target) + i, (__m512i)x.part[i]);
#elif defined(__AVX2__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i, (__m256i)x.part[i]);
#endif
    });
  }
}

// Orders the streamed stores before all later stores.
FASTBN_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace fastbn::cpu::FASTBN_ISA
