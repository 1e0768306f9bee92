// The mask, one bit per element. Each run starts at a byte boundary. Where a row of a tile has several short runs, leaf
// loops work on rows of bits without gaps: the bits are gathered from the padded runs before, or scattered to them
// after.
#pragma once

#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/vec_memory.h"

namespace fastbn::cpu::FASTBN_ISA {

// Returns relu's mask bits from its output y: !(y <= 0). For bfloat16 in pairs of AVX-512 registers they say whether y
// is nonzero as stored, which the smallest y are not.
template <class T>
FASTBN_INLINE uint64_t relu_bits(const Vec<acc_t<T>>& y) {
#if defined(__AVX512F__)
  if constexpr (interleaved<T>) return _mm512_test_epi16_mask((__m512i)pack_interleaved(y), _mm512_set1_epi16(0x7fff));
#endif
  return to_bits<T>(!(y <= Vec<acc_t<T>>(0)));
}

// The mask bits of a tile, without gaps in its rows.
struct MaskRows {
  const uint8_t* bits;
  int64_t stride;
};

// Store and load the `count` bits of columns from `column` on. To store, `column` must be a multiple of 8.
__attribute__((noinline)) inline void store_some_bits(uint8_t* row, int64_t column, int count, uint64_t bits) {
  bits &= (uint64_t(1) << count) - 1;
  for (int i = 0; 8 * i < count; ++i) row[column / 8 + i] = uint8_t(bits >> 8 * i);
}
template <class T>
FASTBN_INLINE uint64_t load_some_bits(const uint8_t* row, int64_t column, int count) {
  const int64_t first = column / 8, last = (column + count - 1) / 8;
  uint64_t bits = row[first];
  // The lanes reach at most this many further bytes, if they start at the last bit of one: a bound that g++ unrolls by.
  for (int i = 1; i <= (Vec<acc_t<T>>::lanes + 6) / 8; ++i)
    if (first + i <= last) bits |= uint64_t(row[first + i]) << 8 * i;
  return bits >> column % 8;
}

// Stores the mask bits of a vector. Vectors of fewer than eight lanes share a byte with their neighbours; the first of
// them overwrites it. The last vector of a row leaves out the columns of the one that it overlaps.
template <class T, class Lanes>
FASTBN_INLINE void store_bits(uint8_t* row, int64_t column, Lanes lanes, uint64_t bits) {
  constexpr int all = Vec<acc_t<T>>::lanes;
  const int first = overlaps_at_ends ? int(-column & (all - 1)) : 0, count = lanes.count - first;
  if constexpr (all < 8) {
    const uint8_t part = uint8_t(bits >> first << (column + first) % 8);
    uint8_t& byte = row[(column + first) / 8];
    byte = (column + first) % 8 == 0 ? part : uint8_t(byte | part);
  } else if (count == all) {  // more than eight lanes only on x86, which is little-endian
    std::memcpy(row + column / 8, &bits, all / 8);
  } else {
    store_some_bits(row, column + first, count, bits >> first);
  }
}

// Loads the mask bits of a vector.
template <class T, template <class> class Lanes>
FASTBN_INLINE uint64_t load_bits(const uint8_t* row, int64_t column, Lanes<T> lanes) {
  constexpr int all = Vec<acc_t<T>>::lanes;
  const bool overlaps = overlaps_at_ends && column % all != 0;
  if (lanes.count < all || overlaps) return load_some_bits<T>(row, column, lanes.first + lanes.count);
  if constexpr (all > 8) {  // little-endian, as above
    uint32_t bits = 0;
    std::memcpy(&bits, row + column / 8, all / 8);
    return bits;
  } else {
    return uint32_t(row[column / 8]) >> column % 8;
  }
}

// Rows that are gathered at a time, each of at most 64 elements.
constexpr int64_t gathered_rows = 64, gathered_bytes = 8;

// Returns whether a row of `cols` elements spans several padded runs.
FASTBN_INLINE bool has_gaps(const MaskTile& mask, int64_t cols) { return mask.run < cols; }

// Calls `call(part, first row, bits)` for a few rows of a tile at a time. `bits` has `gathered_bytes` bytes per row.
template <class Call>
FASTBN_INLINE void for_gathered_rows(const Tile& tile, Call&& call) {
  uint64_t bits[gathered_rows];
  for (int64_t row = 0; row < tile.rows; row += gathered_rows) {
    Tile part = tile;
    part.offset += row * tile.row_stride;
    part.channel += row * tile.channel_step;
    part.rows = tile.rows - row < gathered_rows ? tile.rows - row : gathered_rows;
    call(part, row, bits);
  }
}

// Scatter the bits of a row to its padded runs, and gather them again. Runs of up to eight elements take one byte each
// and have loops of their own.
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
