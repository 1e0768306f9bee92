// The loop of one-pass kernels over the channel tiles of a block's group. The first tile is loaded here, each later one
// by the work on the tile before it.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/partial_exchange.cuh"
#include "cuda/block/smem_ring.cuh"

namespace fastbn::cuda {

// Calls work(walk, is_first) for each tile. `work` visits every vector twice, and passes its slot on by
// ring.after_sums and ring.after_output.
template <class Walk, class T, class Fetch, class Work>
FASTBN_DEVICE void for_each_tile(const Layout& layout, const Plan& plan, SmemRing<T>& ring, PartialExchange& exchange,
                                 Fetch fetch, Work work) {
  FASTBN_KEEP_LOOP
  while (true) {
    const int block = device::opaque(static_cast<int>(device::block_x()));
    const int tile = block / plan.splits + exchange.count() * plan.groups;
    if (tile >= plan.tiles) break;
    const Walk walk(layout, plan, tile, block % plan.splits);
    const bool is_first = exchange.count() == 0;
    if (is_first) {
      ring.fill(walk, fetch);
      exchange.init();
    }
    work(walk, is_first);
    ring.finish_tile(walk);
  }
  exchange.finish();
}

}  // namespace fastbn::cuda
