// The loop that one-pass kernels have in common: over the slices of a block's group, the first one brought in here and
// every other by the work on the one before it.
#pragma once

#include "cuda/loop.cuh"
#include "cuda/rendezvous.cuh"
#include "cuda/slab.cuh"

namespace fastbn::cuda {

// Calls work(walk, is_first) for each slice; work makes the output of every octet and hands its place on by
// slab.replace.
template <class Walk, class T, class Part, class Fetch, class Work>
FASTBN_DEVICE void for_each_slice(const Layout& layout, const Plan& plan, Slab<T>& slab, Rendezvous<Part>& rendezvous,
                                  Fetch fetch, Work work) {
  const int block = static_cast<int>(device::block_x()), split = block % plan.splits;
  FASTBN_KEEP_LOOP
  for (int slice = block / plan.splits; slice < plan.slices; slice += plan.groups) {
    const Walk walk(layout, plan, slice, split);
    const bool is_first = slice < plan.groups;
    if (is_first) {
      slab.bring(walk, fetch);
      rendezvous.open();
    }
    work(walk, is_first);
    slab.close();
  }
  rendezvous.leave();
}

}  // namespace fastbn::cuda
