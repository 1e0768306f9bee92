// The mask, a bit an element. Each run begins a byte, so where several short runs make a row of a block, leaf loops see
// rows of bits without gaps, which are gathered from the padded runs before or spread over them afterwards.
#pragma once

#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/vec_memory.h"

namespace fastbn::cpu::FASTBN_ISA {

// Mask bits of relu from what it made, y: !(y <= 0), and as bfloat16 in pairs of AVX-512 registers whether y is another
// number than 0 as it is stored, which the smallest are not.
template <class T>
FASTBN_INLINE uint64_t relu_bits(const Vec<acc_t<T>>& y) {
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) return _mm512_test_epi16_mask((__m512i)pack_interleaved(y), _mm512_set1_epi16(0x7fff));
#endif
  return to_bits<T>(!(y <= Vec<acc_t<T>>(0)));
}

// A vector's bits of a row. Vectors of fewer than eight lanes share a byte with their neighbours, and the first of them
// starts it.
template <class T, class Lanes>
FASTBN_INLINE void store_bits(uint8_t* row, int64_t column, Lanes lanes, uint64_t bits) {
  constexpr int all = Vec<acc_t<T>>::lanes;
  bits = bits >> lanes.first & ((uint64_t(1) << lanes.count) - 1);
  column += lanes.first;
  if constexpr (all < 8) {
    const uint8_t part = uint8_t(bits << column % 8);
    row[column / 8] = column % 8 == 0 ? part : uint8_t(row[column / 8] | part);
  } else if (lanes.count == all) {  // more than eight only on x86, whose first byte is the lowest
    std::memcpy(row + column / 8, &bits, all / 8);
  } else {
    for (int i = 0; 8 * i < lanes.count; ++i) row[column / 8 + i] = uint8_t(bits >> 8 * i);
  }
}

template <class T>
FASTBN_INLINE uint64_t load_bits(const uint8_t* row, int64_t column, AllLanes<T>) {
  constexpr int all = Vec<acc_t<T>>::lanes;
  if constexpr (all > 8) {  // as above
    uint32_t bits = 0;
    std::memcpy(&bits, row + column / 8, all / 8);
    return bits;
  } else {
    uint32_t bits = row[column / 8];
    if (all < 8) bits >>= column % 8;
    return bits;
  }
}
template <class T>
FASTBN_INLINE uint64_t load_bits(const uint8_t* row, int64_t column, EndLanes<T> lanes) {
  const int64_t first = column / 8, last = (column + lanes.first + lanes.count - 1) / 8;
  uint64_t bits = row[first];
  // As many further bytes as the lanes can reach from a byte's last bit: a bound that g++ unrolls by.
  for (int i = 1; i <= (Vec<acc_t<T>>::lanes + 6) / 8; ++i)
    if (first + i <= last) bits |= uint64_t(row[first + i]) << 8 * i;
  return bits >> column % 8;
}

// Rows of at most 64 elements, which is several runs.
constexpr int64_t gathered_rows = 64, gathered_bytes = 8;

FASTBN_INLINE bool has_gaps(const MaskBlock& mask, int64_t cols) { return mask.run < cols; }

// call(block, bits of its rows): a few rows of a block at a time, whose bits lie in `bits`, gathered_bytes a row.
template <class Call>
FASTBN_INLINE void for_gathered_rows(const Block& block, Call&& call) {
  uint64_t bits[gathered_rows];
  for (int64_t row = 0; row < block.rows; row += gathered_rows) {
    Block part = block;
    part.offset += row * block.row_stride;
    part.rows = block.rows - row < gathered_rows ? block.rows - row : gathered_rows;
    call(part, row, bits);
  }
}

// Padded runs of a row to and from a word. Runs of up to eight elements, a byte each, get loops of their own.
FASTBN_INLINE void spread_bits(uint64_t word, int64_t cols, int64_t run, uint8_t* padded) {
  const uint64_t ones = (uint64_t(1) << run) - 1;
  if (run <= 8) {
    for (int64_t at = 0; at < cols; at += run) *padded++ = uint8_t(word >> at & ones);
  } else {
    for (int64_t at = 0; at < cols; at += run)
      for (int64_t bit = 0; bit < run; bit += 8) *padded++ = uint8_t((word >> at & ones) >> bit);
  }
}

FASTBN_INLINE uint64_t gather_bits(const uint8_t* padded, int64_t cols, int64_t run) {
  uint64_t word = 0;
  if (run <= 8) {
    for (int64_t at = 0; at < cols; at += run) word |= uint64_t(*padded++) << at;
  } else {
    for (int64_t at = 0; at < cols; at += run)
      for (int64_t bit = 0; bit < run; bit += 8) word |= uint64_t(*padded++) << (at + bit);
  }
  return word;
}

}  // namespace fastbn::cpu::FASTBN_ISA
