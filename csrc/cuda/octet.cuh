// Loads and stores of an octet: eight consecutive elements of a run, or the run's tail. It is the unit of a thread's
// work and of the mask. Held as it lies in memory, so that octets on their way take no more registers than bytes.
#pragma once

#include "cuda/device.cuh"
#include "math/plan.h"
#include "math/types.h"

namespace fastbn::cuda {

template <class T>
struct Octet {
  static constexpr int lanes = device::Vector16<T>::size;
  device::Vector16<T> part[octet / lanes];

  FASTBN_DEVICE acc_t<T> operator[](int i) const { return to_acc(part[i / lanes].lane[i % lanes]); }
};

template <class T>
FASTBN_DEVICE Octet<T> load_octet(const T* from, int count, bool vectorized) {
  constexpr int lanes = Octet<T>::lanes;
  Octet<T> value = {};
  if (vectorized && count == octet) {
    FASTBN_UNROLL
    for (int i = 0; i < octet; i += lanes) value.part[i / lanes] = device::load16(from + i);
  } else {
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      if (i < count) value.part[i / lanes].lane[i % lanes] = from[i];
    }
  }
  return value;
}

template <class T>
FASTBN_DEVICE void store_octet(T* to, int count, bool vectorized, const acc_t<T> (&value)[octet]) {
  constexpr int lanes = Octet<T>::lanes;
  Octet<T> rounded;
  FASTBN_UNROLL
  for (int i = 0; i < octet; ++i) rounded.part[i / lanes].lane[i % lanes] = from_acc<T>(value[i]);
  if (vectorized && count == octet) {
    FASTBN_UNROLL
    for (int i = 0; i < octet; i += lanes) device::store16(to + i, rounded.part[i / lanes]);
  } else {
    FASTBN_UNROLL
    for (int i = 0; i < octet; ++i) {
      if (i < count) to[i] = rounded.part[i / lanes].lane[i % lanes];
    }
  }
}

}  // namespace fastbn::cuda
