// Loops over arrays in registers. Most are unrolled. Where the body is long (transcendentals in double) the loop stays
// rolled and selects its element, so that code and registers do not grow eightfold.
#pragma once

#include "cuda/device/device.cuh"

#ifdef __CUDACC__
#define FASTBN_KEEP_LOOP _Pragma("unroll 1")
#else
#define FASTBN_KEEP_LOOP
#endif

namespace fastbn::cuda {

// Returns array[first + i], where `first` is a multiple of `part` and `i` a constant below it.
template <int part = 1, class V, int n>
FASTBN_DEVICE V pick(const V (&array)[n], int first, int i = 0) {
  V value = array[i];
  FASTBN_UNROLL
  for (int k = part; k < n; k += part) value = first == k ? array[k + i] : value;
  return value;
}

// Sets array[first + i], for the same `first` and `i`.
template <int part = 1, class V, int n>
FASTBN_DEVICE void insert(V (&array)[n], int first, int i, V value) {
  FASTBN_UNROLL
  for (int k = 0; k < n; k += part) array[k + i] = first == k ? value : array[k + i];
}

}  // namespace fastbn::cuda
