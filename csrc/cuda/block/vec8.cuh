// Loads and stores of an octet: eight consecutive elements of a run, or the run's tail. It is the unit of a thread's
// work and of the mask. Held as it lies in memory, so that octets on their way take no more registers than bytes.
#pragma once

#include <type_traits>

#include "cuda/block/loop.cuh"
#include "cuda/device/device.cuh"
#include "math/types.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Of half types two elements a word: taken as 16 bits, each half of one would be moved about first.
template <class T>
struct Vec8 {
  static constexpr bool is_half = sizeof(T) == 2;
  using Lane = std::conditional_t<is_half, uint32_t, T>;
  using Vector = device::Vector16<Lane>;
  static constexpr int vectors = vec_size * sizeof(T) / sizeof(Vector);
  Vector part[vectors];

  FASTBN_DEVICE acc_t<T> operator[](int i) const {
    if constexpr (is_half) {
      return i % 2 ? upper_to_acc<T>(part[0].element[i / 2]) : lower_to_acc<T>(part[0].element[i / 2]);
    } else {
      return part[i / Vector::size].element[i % Vector::size];
    }
  }

  // In an octet that was all zeros.
  FASTBN_DEVICE void set(int i, T value) {
    if constexpr (is_half) {
      part[0].element[i / 2] |= uint32_t(value.bits) << i % 2 * 16;
    } else {
      part[i / Vector::size].element[i % Vector::size] = value;
    }
  }
};

// whole: known to be eight elements from a multiple of 16 bytes on.
template <bool aligned, class T>
FASTBN_DEVICE Vec8<T> load_vec(const T* from, int count, bool vectorized) {
  using Vector = typename Vec8<T>::Vector;
  Vec8<T> value;
  if (aligned || (vectorized && count == vec_size)) {
    FASTBN_UNROLL
    for (int i = 0; i < Vec8<T>::vectors; ++i) {
      value.part[i] = device::load16(reinterpret_cast<const typename Vec8<T>::Lane*>(from) + i * Vector::size);
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

template <bool aligned, class T>
FASTBN_DEVICE void store_vec(T* to, int count, bool vectorized, const acc_t<T> (&value)[vec_size]) {
  constexpr int lanes = device::Vector16<T>::size;
  device::Vector16<T> rounded[vec_size / lanes];
  FASTBN_UNROLL
  for (int i = 0; i < vec_size; ++i) rounded[i / lanes].element[i % lanes] = from_acc<T>(value[i]);
  if (aligned || (vectorized && count == vec_size)) {
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; i += lanes) device::store16(to + i, rounded[i / lanes]);
  } else {
    FASTBN_UNROLL
    for (int i = 0; i < vec_size; ++i) {
      if (i < count) to[i] = rounded[i / lanes].element[i % lanes];
    }
  }
}

}  // namespace fastbn::cuda
