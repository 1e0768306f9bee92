// relu's derivative from the bits of x. z = (x - pivot) * scale + shift is monotone in x, as it is rounded too, so that
// z > 0 on one side of a threshold. As bits, unsigned, modulo 2^16, that side is an interval of bfloat16: where loops
// take a register of them as it is stored, a subtraction and a comparison find the derivatives that the formula needs
// seven instructions for: backward of bfloat16 is 1.0 to 1.45 times as fast, mostly 1.2 (EPYC 9004). A NaN, of which z
// is NaN too, may lie on either side: where it is part of a batch, all z of its channel are NaN, and all derivatives 1.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/vec_memory.h"
#include "math/affine.h"
#include "math/types.h"

namespace fastbn::cpu::FASTBN_ISA {

// Intervals of at most chunk_channels channels, found bit by bit, in loops that compilers vectorise.
template <class T>
void relu_intervals(const Affine<float>* affine, int64_t channels, uint16_t* first, uint16_t* span) {
  // Keys have the order of what they stand for: -NaN, -inf, finite numbers, inf, NaN. Beyond the finite ones all are as
  // the last of these.
  constexpr uint32_t lowest = 0x80, highest = 0xff7f;
  float pivot[chunk_channels], scale[chunk_channels], shift[chunk_channels];
  uint32_t starts_upper[chunk_channels], last[chunk_channels];
  auto is_upper = [&](int64_t channel, uint32_t key) FASTBN_INLINE_LAMBDA -> uint32_t {
    key = key < lowest ? lowest : key > highest ? highest : key;
    const float x = bit_cast<float>((key >= 0x8000 ? key - 0x8000 : 0xffff - key) << 16);
    return !(Affine<float>{pivot[channel], scale[channel], shift[channel]}.apply(x) <= 0);
  };
  for (int64_t i = 0; i < channels; ++i) {
    pivot[i] = affine[i].pivot;
    scale[i] = affine[i].scale;
    shift[i] = affine[i].shift;
    last[i] = 0;  // on the side of the first
    starts_upper[i] = is_upper(i, lowest);
  }
  for (uint32_t bit = 0x8000; bit > 0; bit >>= 1)
    for (int64_t i = 0; i < channels; ++i) last[i] |= is_upper(i, last[i] | bit) == starts_upper[i] ? bit : 0;
  for (int64_t i = 0; i < channels; ++i) {
    if (starts_upper[i]) {  // keys up to the last
      first[i] = uint16_t(last[i] < 0x8000 ? 0xffff - last[i] : 0x8000);
      span[i] = uint16_t(last[i]);
    } else if (last[i] == 0xffff) {  // none but a NaN
      first[i] = 0xffff;
      span[i] = 0;
    } else {
      first[i] = uint16_t(last[i] >= 0x8000 ? last[i] - 0x7fff : 0);
      span[i] = uint16_t(0xfffe - last[i]);
    }
  }
}

// Intervals of as many elements as a register of bfloat16 holds.
struct Intervals {
  Shorts first, span;
};

template <bool per_column>
FASTBN_INLINE Intervals intervals_at(const ReluIntervals& arrays, int64_t at) {
  Intervals intervals;
  if constexpr (per_column) {
    std::memcpy(&intervals.first, arrays.first + at, register_bytes);
    std::memcpy(&intervals.span, arrays.span + at, register_bytes);
  } else {
    intervals.first = Shorts{} + arrays.first[at];
    intervals.span = Shorts{} + arrays.span[at];
  }
  return intervals;
}

// Elements of grad_out whose x lies in its interval; others are 0.
template <class Lanes>
FASTBN_INLINE Vec<float> load_inside(const Intervals& intervals, const bfloat16* x, const bfloat16* grad_out,
                                     Lanes lanes) {
  const Shorts beyond = (Shorts)load_register(x, lanes) - intervals.first;
#if defined(__AVX512F__)
  return load_where(_mm512_cmple_epu16_mask((__m512i)beyond, (__m512i)intervals.span), grad_out, lanes);
#else
  return unpack_interleaved(load_register(grad_out, lanes) & (Words)(beyond <= intervals.span));
#endif
}

}  // namespace fastbn::cpu::FASTBN_ISA
