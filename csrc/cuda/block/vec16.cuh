// Vectors of 16 bytes as they lie in memory: 8 elements of a half type, or 4 of float32. Neighbouring lanes move
// neighbouring vectors, so that a warp's access fills whole sectors in every dtype.
#pragma once

#include "cuda/device/device.cuh"
#include "math/types.h"

namespace fastbn::cuda {

using Vec16 = device::Vector16<uint32_t>;

template <class T>
constexpr int vec16_size = 16 / sizeof(T);

FASTBN_DEVICE Vec16 load_vec16(const Vec16* from) { return device::load16(from->element); }
FASTBN_DEVICE void store_vec16(Vec16* to, const Vec16& vector) { device::store16(to->element, vector); }

template <class T>
FASTBN_DEVICE float element_of(const Vec16& vector, int i) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return bit_cast<float>(vector.element[i]);
  } else {
    const uint32_t word = vector.element[i / 2];
    return i % 2 ? upper_to_acc<T>(word) : lower_to_acc<T>(word);
  }
}

// Rounds numbers to T. `relu`: negative numbers become 0.
template <class T, bool relu = false>
FASTBN_DEVICE Vec16 vec16_of(const float (&values)[vec16_size<T>]) {
  Vec16 vector;
  FASTBN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      vector.element[i] = bit_cast<uint32_t>(relu ? device::max_or_nan(values[i], 0.0f) : values[i]);
    } else {
      vector.element[i] = device::pack_pair<T, relu>(values[2 * i], values[2 * i + 1]);
    }
  }
  return vector;
}

// Returns the bits of a vector, the first in the lowest bit. A byte of the mask has those of 8 elements: one vector of
// a half type, or two of float32, of which the second has the upper half.
template <class T>
FASTBN_DEVICE uint32_t mask_bits_of(const uint8_t* mask, int64_t vector) {
  if constexpr (sizeof(T) == sizeof(float)) return mask[vector / 2] >> (vector % 2 * 4);
  return mask[vector];
}

}  // namespace fastbn::cuda
