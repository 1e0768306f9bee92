// Loops over arrays in registers. Unrolled they are plain; where the body is long (transcendentals in double), a loop
// that stays a loop selects its element instead, so that code and registers do not grow eightfold.
#pragma once

#include "cuda/device.cuh"

#ifdef __CUDACC__
#define FASTBN_KEEP_LOOP _Pragma("unroll 1")
#else
#define FASTBN_KEEP_LOOP
#endif

namespace fastbn::cuda {

template <class V, int n>
FASTBN_DEVICE V pick(const V (&array)[n], int index) {
  V value = array[0];
  FASTBN_UNROLL
  for (int i = 1; i < n; ++i) value = index == i ? array[i] : value;
  return value;
}

template <class V, int n>
FASTBN_DEVICE void place(V (&array)[n], int index, V value) {
  FASTBN_UNROLL
  for (int i = 0; i < n; ++i) array[i] = index == i ? value : array[i];
}

}  // namespace fastbn::cuda
