// The loop that one-pass kernels have in common: over the slices of a block's group, the first one brought in here and
// every other by the work on the one before it.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/rendezvous.cuh"
#include "cuda/block/slab.cuh"

namespace fastbn::cuda {

// Calls work(walk, is_first) for each slice; work visits every octet twice and hands its place on by slab.after_sums
// and slab.after_output.
template <class Walk, class T, class Fetch, class Work>
FASTBN_DEVICE void for_each_slice(const Layout& layout, const Plan& plan, Slab<T>& slab, Rendezvous& rendezvous,
                                  Fetch fetch, Work work) {
  FASTBN_KEEP_LOOP
  while (true) {
    const int block = device::opaque(static_cast<int>(device::block_x()));
    const int slice = block / plan.splits + rendezvous.slices() * plan.groups;
    if (slice >= plan.tiles) break;
    const Walk walk(layout, plan, slice, block % plan.splits);
    const bool is_first = rendezvous.slices() == 0;
    if (is_first) {
      slab.bring(walk, fetch);
      rendezvous.open();
    }
    work(walk, is_first);
    slab.close(walk);
  }
  rendezvous.leave();
}

}  // namespace fastbn::cuda
