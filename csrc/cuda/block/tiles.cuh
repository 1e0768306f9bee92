// The loop that one-pass kernels have in common: over the slices of a block's group, the first one brought in here and
// every other by the work on the one before it.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/partial_exchange.cuh"
#include "cuda/block/smem_ring.cuh"

namespace fastbn::cuda {

// Calls work(walk, is_first) for each slice; work visits every octet twice and hands its place on by ring.after_sums
// and ring.after_output.
template <class Walk, class T, class Fetch, class Work>
FASTBN_DEVICE void for_each_tile(const Layout& layout, const Plan& plan, SmemRing<T>& ring, PartialExchange& exchange,
                                 Fetch fetch, Work work) {
  FASTBN_KEEP_LOOP
  while (true) {
    const int block = device::opaque(static_cast<int>(device::block_x()));
    const int slice = block / plan.splits + exchange.slices() * plan.groups;
    if (slice >= plan.tiles) break;
    const Walk walk(layout, plan, slice, block % plan.splits);
    const bool is_first = exchange.slices() == 0;
    if (is_first) {
      ring.bring(walk, fetch);
      exchange.open();
    }
    work(walk, is_first);
    ring.close(walk);
  }
  exchange.leave();
}

}  // namespace fastbn::cuda
