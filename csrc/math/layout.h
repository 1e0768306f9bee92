// How a tensor (N, C, *) lies in memory: as row-major [outer, channels, inner]. Contiguous tensors have inner =
// prod(*); channels_last and (N, C) have inner = 1. Everything below the bindings sees only this.
#pragma once

#include <cstdint>

#include "math/macros.h"

namespace fastbn {

// The dimensions of a dense tensor as [outer, channels, inner].
struct Layout {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 1;

  // Returns the number of elements per channel.
  FASTBN_INLINE int64_t count() const { return outer * inner; }
  FASTBN_INLINE int64_t numel() const { return outer * channels * inner; }

  FASTBN_INLINE bool channels_are_innermost() const { return inner == 1; }

  // Return the length and the number of runs. A run is what kernels walk: the contiguous elements of one channel, or of
  // one row if channels are innermost.
  FASTBN_INLINE int64_t run() const { return channels_are_innermost() ? channels : inner; }
  FASTBN_INLINE int64_t runs() const { return channels_are_innermost() ? outer : outer * channels; }

  // Returns the mask bytes of a run: one bit per element, padded to full bytes.
  FASTBN_INLINE int64_t mask_bytes_per_run() const { return (run() + 7) / 8; }

  // Returns the index of the mask byte of the vector of 8 that begins at `element`.
  FASTBN_INLINE int64_t mask_byte(int64_t element) const {
    return element / run() * mask_bytes_per_run() + element % run() / 8;
  }
};

enum class MemoryFormat { contiguous, channels_last };

// Returns the k-th dimension in memory order of channels_last, innermost first: channels, the spatial dimensions from
// the last, the batch.
inline int64_t channels_last_dim(int64_t k, int64_t dim) { return k == 0 ? 1 : (k == dim - 1 ? 0 : dim - k); }

// Returns whether a tensor is dense in a format, as torch's is_contiguous(memory_format) does: strides of dimensions of
// size 1 do not matter, and an empty tensor is dense in every format.
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim, MemoryFormat format) {
  int64_t expected = 1;
  bool dense = true;
  for (int64_t k = 0; k < dim; ++k) {
    const int64_t d = format == MemoryFormat::channels_last ? channels_last_dim(k, dim) : dim - 1 - k;
    if (sizes[d] == 0) return true;
    dense &= sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
  }
  return dense;
}

// Returns the format of output and gradients; channels_last stands for channels_last_3d too. A tensor that is dense in
// exactly one format has that format. For all others the answer is that of torch's Tensor.suggest_memory_format, which
// checks whether the strides are those of channels_last, up to gaps, and not also those of a contiguous tensor.
inline MemoryFormat suggest_memory_format(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  if (dim != 4 && dim != 5) return MemoryFormat::contiguous;
  int64_t min_stride = 0;
  bool last = strides[1] != 0;
  for (int64_t k = 0; k < dim && last; ++k) {
    const int64_t d = channels_last_dim(k, dim);
    last = sizes[d] != 0 && strides[d] >= min_stride && !(d == 0 && min_stride == strides[1]);
    min_stride = strides[d] * sizes[d];
  }
  // torch's answer depends on the strides of dimensions of size 1, which are arbitrary.
  last = last || (is_dense(sizes, strides, dim, MemoryFormat::channels_last) &&
                  !is_dense(sizes, strides, dim, MemoryFormat::contiguous));
  return last ? MemoryFormat::channels_last : MemoryFormat::contiguous;
}

// Returns the number of elements from the first to the last of a strided tensor, gaps included.
inline int64_t extent_of(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  int64_t extent = 1;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return 0;
    extent += (sizes[d] - 1) * strides[d];
  }
  return extent;
}

// Returns the layout of a dense tensor. A single channel is one long run in every format.
inline Layout layout_of(const int64_t* sizes, int64_t dim, MemoryFormat format) {
  int64_t space = 1;
  for (int64_t d = 2; d < dim; ++d) space *= sizes[d];
  if (sizes[1] == 1) return {1, 1, sizes[0] * space};
  if (format == MemoryFormat::channels_last || space == 1) return {sizes[0] * space, sizes[1], 1};
  return {sizes[0], sizes[1], space};
}

}  // namespace fastbn
