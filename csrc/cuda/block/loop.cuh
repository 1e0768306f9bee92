// Loops over arrays in registers. Unrolled they are plain; where the body is long (transcendentals in double), a loop
// that stays a loop selects its element instead, so that code and registers do not grow eightfold.
#pragma once

#include "cuda/device/device.cuh"
#include "plan/plan.h"

#ifdef __CUDACC__
#define FASTBN_KEEP_LOOP _Pragma("unroll 1")
#else
#define FASTBN_KEEP_LOOP
#endif

namespace fastbn::cuda {

// array[first + i], where first is a multiple of part and i a constant below it.
template <int part = 1, class V, int n>
FASTBN_DEVICE V pick(const V (&array)[n], int first, int i = 0) {
  V value = array[i];
  FASTBN_UNROLL
  for (int at = part; at < n; at += part) value = first == at ? array[at + i] : value;
  return value;
}

template <int part = 1, class V, int n>
FASTBN_DEVICE void insert(V (&array)[n], int first, int i, V value) {
  FASTBN_UNROLL
  for (int at = 0; at < n; at += part) array[at + i] = first == at ? value : array[at + i];
}

}  // namespace fastbn::cuda
