// Loops over the vectors of a walk, several of them side by side.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/walk.cuh"
#include "cuda/device/device.cuh"

namespace fastbn::cuda {

// Vectors that a thread loads before it uses the first of them, where each takes `bytes` bytes.
template <int64_t bytes>
constexpr int vectors_in_flight = bytes >= 64   ? 1
                                  : bytes >= 32 ? 2
                                                : 4;

// Calls use(step, load(step)) for every vector of the walk, with `unroll` loads before the first use while there are as
// many vectors.
template <int unroll, class Walk, class Load, class Use>
FASTBN_DEVICE void for_each_vector(Walk walk, Load load, Use use) {
  using Item = decltype(load(Step{}));
  if constexpr (unroll > 1) {
    FASTBN_KEEP_LOOP
    while (walk.left() >= unroll) {
      Step steps[unroll];
      Item items[unroll];
      FASTBN_UNROLL
      for (int i = 0; i < unroll; ++i) {
        steps[i] = walk.step();
        items[i] = load(steps[i]);
        walk.next();
      }
      FASTBN_UNROLL
      for (int i = 0; i < unroll; ++i) use(steps[i], items[i]);
    }
  }
  FASTBN_KEEP_LOOP
  while (walk.more()) {
    const Step step = walk.step();
    use(step, load(step));
    walk.next();
  }
}

}  // namespace fastbn::cuda
