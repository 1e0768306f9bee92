// Rows shorter than a vector, for instruction sets that load and store full vectors only: a few rows at a time are
// copied to rows of one vector each, which the loops then take. What they compute beyond a row is left out: of sums by
// the loops, and of outputs when these are copied back.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/mask_bits.h"
#include "cpu/simd/vec_memory.h"

namespace fastbn::cpu::FASTBN_ISA {

// Returns whether the rows of a tile have to be copied.
template <class T>
FASTBN_INLINE bool has_short_rows(const Tile& tile) {
  return overlaps_at_ends && tile.cols < Vec<acc_t<T>>::lanes;
}

constexpr int64_t padded_rows = 16;  // copied at a time: they stay in L1 (an estimate)

// Returns the part of a tile that begins at `row` and has at most `padded_rows` rows.
inline Tile part_to_pad(const Tile& tile, int64_t row) {
  Tile part = tile;
  part.offset += row * tile.row_stride;
  part.channel += row * tile.channel_step;
  part.rows = std::min(padded_rows, tile.rows - row);
  return part;
}

// Returns the tile that the copied rows of a part are.
template <class T>
Tile padded(Tile part) {
  part.offset = 0;
  part.row_stride = Vec<acc_t<T>>::lanes;
  part.out_of_cache = false;
  return part;
}

// The rows of one tensor.
template <class T>
class PaddedRows {
 public:
  // Returns a copy of the rows of a tensor, or null for null.
  __attribute__((noinline)) const void* copy(const void* tensor, const Tile& part) {
    if (!tensor) return nullptr;
    const T* source = static_cast<const T*>(tensor) + part.offset;
    std::fill_n(rows_, part.rows * lanes, T{});
    for (int64_t row = 0; row < part.rows; ++row)
      for (int64_t j = 0; j < part.cols; ++j) rows_[row * lanes + j] = source[row * part.row_stride + j];
    return rows_;
  }
  // Returns where to write rows of an output, or null if there is no such output.
  void* rows_of(void* tensor) { return tensor ? rows_ : nullptr; }
  __attribute__((noinline)) void copy_to(void* tensor, const Tile& part) const {
    if (!tensor) return;
    T* target = static_cast<T*>(tensor) + part.offset;
    for (int64_t row = 0; row < part.rows; ++row)
      for (int64_t j = 0; j < part.cols; ++j) target[row * part.row_stride + j] = rows_[row * lanes + j];
  }

 private:
  static constexpr int64_t lanes = Vec<acc_t<T>>::lanes;
  T rows_[padded_rows * lanes];
};

// The mask bits of the rows.
class PaddedBits {
 public:
  static constexpr int64_t stride = 2;  // in bytes
  static_assert(!overlaps_at_ends || Vec<float>::lanes <= 8 * stride);

  uint8_t* bytes() { return bytes_; }
  __attribute__((noinline)) const uint8_t* copy(const uint8_t* mask, int64_t mask_stride, const Tile& part) {
    if (!mask) return nullptr;
    for (int64_t row = 0; row < part.rows; ++row)
      for (int64_t byte = 0; byte < stride; ++byte)
        bytes_[row * stride + byte] = 8 * byte < part.cols ? mask[row * mask_stride + byte] : 0;
    return bytes_;
  }
  // Bits beyond a row become 0.
  __attribute__((noinline)) void copy_to(uint8_t* mask, int64_t mask_stride, const Tile& part) const {
    for (int64_t row = 0; row < part.rows; ++row) {
      for (int64_t byte = 0; 8 * byte < part.cols; ++byte) {
        const int64_t bits = std::min<int64_t>(8, part.cols - 8 * byte);
        mask[row * mask_stride + byte] = uint8_t(bytes_[row * stride + byte] & ((1 << bits) - 1));
      }
    }
  }

 private:
  uint8_t bytes_[padded_rows * stride];
};

// The rows of all tensors of a backward loop.
template <class T>
class PaddedGrads {
 public:
  // Replaces the arguments of a loop by copies. A loop is to write all outputs that it is given, or is to be given
  // none.
  void replace(GradArgs& args, Tile& part, MaskRows& mask) {
    args.grad_out = grad_out_.copy(args.grad_out, part);
    args.input = input_.copy(args.input, part);
    const bool has_epilogue = args.activation != Activation::none;  // otherwise grad_z is grad_out
    args.residual = residual_.copy(has_epilogue && !mask.bits ? args.residual : nullptr, part);
    args.grad_input = grad_input_.rows_of(args.grad_input);
    args.grad_residual = grad_residual_.rows_of(args.grad_residual);
    args.non_temporal = false;
    mask = {bits_.copy(has_epilogue ? mask.bits : nullptr, mask.stride, part), PaddedBits::stride};
    part = padded<T>(part);
  }
  // Copies the outputs to the tensors of the arguments as they were before.
  void write(const GradArgs& args, const Tile& part) const {
    grad_input_.copy_to(args.grad_input, part);
    grad_residual_.copy_to(args.grad_residual, part);
  }

 private:
  PaddedRows<T> grad_out_, input_, residual_, grad_input_, grad_residual_;
  PaddedBits bits_;
};

}  // namespace fastbn::cpu::FASTBN_ISA
