// The shared memory of a stream kernel's block: the ring of chunks, the numbers of the tiles that are in work, and the
// barriers by which roles hand them on.
//
//   producer  --full-->  consumers (sum)  --summed-->  finisher  --ready-->  consumers (write)  --empty-->  producer
//   preparer  --prepared-->  consumers (sum) and finisher;  ready also frees a tile's numbers for the preparer
#pragma once

#include "cuda/block/vec16.cuh"
#include "cuda/device/device.cuh"
#include "plan/stream.h"

namespace fastbn::cuda {

// The position of a tile in the ring, and the parity of the phase that its barriers are in for it.
struct RingPosition {
  int slot = 0, parity = 0;

  FASTBN_DEVICE void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class Map>
class StreamRing {
 public:
  // Keeps references to plan and map, which are parameters of the kernel: what is made of them again takes fewer
  // registers than what is kept.
  FASTBN_DEVICE StreamRing(const Plan& plan, const Map& map) : plan_(plan), map_(map) {}

  // Begins the first phase of all barriers. A sync_block must follow.
  FASTBN_DEVICE void init_barriers() const {
    const int thread = device::thread_index();
    if (thread < plan_.stream.ring_tiles * plan_.stream.chunks_per_tile) {
      device::init_mbarrier(at(map_.full) + thread, stream_warp);  // each lane, when its copies have landed
      device::init_mbarrier(at(map_.empty) + thread, stream_consumer_warps);
    }
    if (thread < plan_.stream.ring_tiles) {
      device::init_mbarrier(at(map_.prepared) + thread, 1);
      device::init_mbarrier(at(map_.summed) + thread, stream_consumer_warps);
      device::init_mbarrier(at(map_.ready) + thread, 1);
    }
  }

  // Barriers of a chunk of the tile at a position in the ring.
  FASTBN_DEVICE device::Mbarrier* full(const RingPosition& tile, int chunk) const {
    return at(map_.full) + (tile.slot * plan_.stream.chunks_per_tile + chunk);
  }
  FASTBN_DEVICE device::Mbarrier* empty(const RingPosition& tile, int chunk) const {
    return at(map_.empty) + (tile.slot * plan_.stream.chunks_per_tile + chunk);
  }

  // Returns the first vector of the first tensor of a tile's part. That of the next follows vectors_per_split later.
  FASTBN_DEVICE Vec16* part(const RingPosition& tile) const {
    const StreamPlan& stream = plan_.stream;
    return reinterpret_cast<Vec16*>(map_.ring.in(memory())) + tile.slot * (stream.tensors * stream.vectors_per_split);
  }

  // Barriers and numbers of the tile at a position.
  FASTBN_DEVICE void arrive_prepared(const RingPosition& tile) const { device::arrive(at(map_.prepared) + tile.slot); }
  FASTBN_DEVICE void wait_prepared(const RingPosition& tile) const {
    device::wait(at(map_.prepared) + tile.slot, tile.parity);
  }
  FASTBN_DEVICE void arrive_summed(const RingPosition& tile) const { device::arrive(at(map_.summed) + tile.slot); }
  FASTBN_DEVICE void wait_summed(const RingPosition& tile) const {
    device::wait(at(map_.summed) + tile.slot, tile.parity);
  }
  FASTBN_DEVICE void arrive_ready(const RingPosition& tile) const { device::arrive(at(map_.ready) + tile.slot); }
  FASTBN_DEVICE void wait_ready(const RingPosition& tile) const {
    device::wait(at(map_.ready) + tile.slot, tile.parity);
  }
  // Waits until the numbers of the tile that was at this position before are no longer needed.
  FASTBN_DEVICE void wait_free(const RingPosition& tile) const {
    device::wait(at(map_.ready) + tile.slot, tile.parity ^ 1);
  }

  FASTBN_DEVICE auto* channels(const RingPosition& tile) const {
    return map_.channels.in(memory()) + tile.slot * plan_.channels_per_tile;
  }
  FASTBN_DEVICE float* fields(const RingPosition& tile) const {
    return map_.fields.in(memory()) + tile.slot * map_.fields_per_tile;
  }
  FASTBN_DEVICE FloatSums* partials(const RingPosition& tile) const {
    return map_.partials.in(memory()) + tile.slot * map_.partials_per_tile;
  }
  FASTBN_DEVICE uint32_t& is_far(const RingPosition& tile) const { return map_.is_far.in(memory())[tile.slot]; }
  FASTBN_DEVICE Sums* totals(int finisher) const {
    return map_.totals.in(memory()) + finisher * plan_.channels_per_tile;
  }

 private:
  FASTBN_DEVICE device::Mbarrier* at(const SharedArray<uint64_t>& barriers) const {
    return reinterpret_cast<device::Mbarrier*>(barriers.in(memory()));
  }

  static FASTBN_DEVICE char* memory() { return device::shared_memory<char>(); }

  const Plan& plan_;
  const Map& map_;
};

}  // namespace fastbn::cuda
