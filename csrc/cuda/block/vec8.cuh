// Vectors of 8: eight consecutive elements of a run, or the run's tail. They are the unit of a thread's work and of the
// mask, and stay in registers as they lie in memory, so that vectors in flight take no more registers than bytes.
#pragma once

#include <type_traits>

#include "cuda/device/device.cuh"
#include "math/types.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Half types are held as words of two elements: the compiler would first move the halves of 16-bit loads into place.
template <class T>
struct Vec8 {
  static constexpr bool is_half = sizeof(T) == 2;
  using Word = std::conditional_t<is_half, uint32_t, T>;
  using Vector = device::Vector16<Word>;
  static constexpr int parts = vec_size * sizeof(T) / sizeof(Vector);
  Vector part[parts];

  FASTBN_DEVICE acc_t<T> operator[](int i) const {
    if constexpr (is_half) {
      const uint32_t word = part[0].element[i / 2];
      return i % 2 ? upper_to_acc<T>(word) : lower_to_acc<T>(word);
    } else {
      return part[i / Vector::size].element[i % Vector::size];
    }
  }

  // Sets an element of a vector that was all zeros.
  FASTBN_DEVICE void set(int i, T value) {
    if constexpr (is_half) {
      part[0].element[i / 2] |= uint32_t(value.bits) << i % 2 * 16;
    } else {
      part[i / Vector::size].element[i % Vector::size] = value;
    }
  }
};

// Loads `count` elements and zeros after them. `aligned`: the caller knows that the vector is full and 16-byte aligned.
template <bool aligned, class T>
FASTBN_DEVICE Vec8<T> load_vec(const T* from, int count, bool vectorized) {
  using Vector = typename Vec8<T>::Vector;
  Vec8<T> value;
  if (aligned || (vectorized && count == vec_size)) {
    FASTBN_UNROLL
    for (int i = 0; i < Vec8<T>::parts; ++i) {
      value.part[i] = device::load16(reinterpret_cast<const typename Vec8<T>::Word*>(from) + i * Vector::size);
    }
  } else {
    value = {};
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) {
      if (i < count) value.set(i, from[i]);
    }
  }
  return value;
}

// Rounds and stores the first `count` elements.
template <bool aligned, class T>
FASTBN_DEVICE void store_vec(T* to, int count, bool vectorized, const acc_t<T> (&value)[vec_size]) {
  constexpr int size = device::Vector16<T>::size;
  device::Vector16<T> rounded[vec_size / size];
  FASTBN_UNROLL
  for (int i = 0; i < vec_size; ++i) rounded[i / size].element[i % size] = from_acc<T>(value[i]);
  if (aligned || (vectorized && count == vec_size)) {
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; i += size) device::store16(to + i, rounded[i / size]);
  } else {
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) {
      if (i < count) to[i] = rounded[i / size].element[i % size];
    }
  }
}

}  // namespace fastbn::cuda
