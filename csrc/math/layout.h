// How a tensor (N, C, *) lies in memory: as [outer, channels, inner], row-major. Contiguous has inner = prod(*);
// channels_last and (N, C) have inner = 1. Everything below the bindings sees only this.
#pragma once

#include <cstdint>

#include "math/macros.h"

namespace fastbn {

struct Layout {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 1;

  // Elements a channel.
  FASTBN_INLINE int64_t count() const { return outer * inner; }
  FASTBN_INLINE int64_t numel() const { return outer * channels * inner; }

  // A run is what kernels walk: the contiguous elements of one channel, or where there is but one, of one row.
  FASTBN_INLINE bool channels_are_innermost() const { return inner == 1; }
  FASTBN_INLINE int64_t run() const { return channels_are_innermost() ? channels : inner; }
  FASTBN_INLINE int64_t runs() const { return channels_are_innermost() ? outer : outer * channels; }

  // The mask holds a bit an element, each run padded to whole bytes.
  FASTBN_INLINE int64_t mask_bytes_per_run() const { return (run() + 7) / 8; }

  // The byte of the octet that begins at an element.
  FASTBN_INLINE int64_t mask_byte(int64_t element) const {
    return element / run() * mask_bytes_per_run() + element % run() / 8;
  }
};

enum class MemoryFormat { contiguous, channels_last };

// What torch's Tensor.suggest_memory_format answers, with channels_last standing for channels_last_3d too: are the
// strides those of channels_last, up to gaps, and not also those of an ambiguous contiguous tensor?
inline MemoryFormat suggest_memory_format(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  if ((dim != 4 && dim != 5) || strides[1] == 0) return MemoryFormat::contiguous;
  int64_t least = 0;
  for (int64_t k = 0; k < dim; ++k) {
    const int64_t d = k == 0 ? 1 : (k == dim - 1 ? 0 : dim - k);  // channels, then space from the last, then batch
    if (sizes[d] == 0 || strides[d] < least) return MemoryFormat::contiguous;
    if (d == 0 && least == strides[1]) return MemoryFormat::contiguous;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return MemoryFormat::channels_last;
}

// Whether a tensor is dense in a format (strides of dimensions of size 1 do not matter).
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim, MemoryFormat format) {
  int64_t expected = 1;
  for (int64_t k = 0; k < dim; ++k) {
    int64_t d = dim - 1 - k;
    if (format == MemoryFormat::channels_last) d = k == 0 ? 1 : (k == dim - 1 ? 0 : dim - k);
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline Layout layout_of(const int64_t* sizes, int64_t dim, MemoryFormat format) {
  int64_t space = 1;
  for (int64_t d = 2; d < dim; ++d) space *= sizes[d];
  if (sizes[1] == 1) return {1, 1, sizes[0] * space};  // one long run, whatever the format
  if (format == MemoryFormat::channels_last || space == 1) return {sizes[0] * space, sizes[1], 1};
  return {sizes[0], sizes[1], space};
}

}  // namespace fastbn
