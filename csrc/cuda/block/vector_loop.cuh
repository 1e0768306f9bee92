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

// Visits every vector of the walk, `unroll` of them side by side while there are as many: calls load(step) for each,
// then wait(), then use(step, item) for each, then done(number of vectors).
template <int unroll, class Walk, class Load, class Wait, class Use, class Done>
FASTBN_DEVICE void for_each_batch(Walk walk, Load load, Wait wait, Use use, Done done) {
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
      wait();
      FASTBN_UNROLL
      for (int i = 0; i < unroll; ++i) use(steps[i], items[i]);
      done(unroll);
    }
  }
  FASTBN_KEEP_LOOP
  while (walk.more()) {
    const Step step = walk.step();
    const Item item = load(step);
    wait();
    use(step, item);
    done(1);
    walk.next();
  }
}

// Calls use(step, load(step)) for every vector of the walk, with `unroll` loads before the first use.
template <int unroll, class Walk, class Load, class Use>
FASTBN_DEVICE void for_each_vector(Walk walk, Load load, Use use) {
  for_each_batch<unroll>(walk, load, [] {}, use, [](int) {});
}

}  // namespace fastbn::cuda
