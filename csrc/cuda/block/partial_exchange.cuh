// Where the blocks of a slice hand one another their parts of its sums: in distributed shared memory if they are a
// cluster, in global memory if they are a part of a cooperative grid. Two buffers take turns, so that a slice costs one
// barrier: who writes into a buffer again has since met all who read it.
#pragma once

#include "cuda/block/reduce.cuh"
#include "cuda/device/device.cuh"
#include "plan/plan.h"

namespace fastbn::cuda {

// Each group's counter has a cache line to itself.
constexpr int64_t counter_words = 32;

class PartialExchange {
 public:
  // shared: two buffers of the slice's channels. workspace: of cooperative plans, a counter a group and then, for each
  // buffer, group and block, the channels. Holds on to the plan: that lies in the kernel's parameters.
  FASTBN_DEVICE PartialExchange(const Plan& plan, Sums* shared, void* workspace)
      : plan_(plan), shared_(shared), workspace_(static_cast<uint32_t*>(workspace)) {}

  // Once, before the first slice.
  FASTBN_DEVICE void open() const {
    if (!cooperative()) return;
    if (leads() && device::thread_index() == 0) *counter() = 0;
    device::sync_grid();
  }

  // That the group has met for.
  FASTBN_DEVICE int slices() const { return slices_; }

  // Whether this block is the one that writes what is of a slice as a whole.
  FASTBN_DEVICE bool leads() const { return block() % plan_.splits == 0; }

  // Where this block's part of a channel of the slice belongs.
  FASTBN_DEVICE Sums& own(int channel) const {
    return cooperative() ? at(block(), channel, slices_) : shared_buffer(slices_)[channel];
  }

  // All parts of the slice are then there.
  FASTBN_DEVICE void meet() {
    ++slices_;
    if (cooperative()) {
      device::sync_blocks(counter(), plan_.splits, slices_);
    } else if (plan_.cluster > 1) {
      device::sync_cluster();
    } else {
      device::sync_block();
    }
  }

  // After meet: the sums of all blocks of the slice, by the lanes of a team, which all get them.
  FASTBN_DEVICE Sums merged(int channel, int lane, int team) const {
    const int met = slices_ - 1;
    if (cooperative()) {
      const Sums* const parts = &at(block() / plan_.splits * plan_.splits, channel, met);
      return merge_parts(plan_.splits, lane, team, [&](int rank) { return parts[rank * plan_.channels_per_tile]; });
    }
    Sums* const own = shared_buffer(met) + channel;
    if (plan_.cluster == 1) return *own;
    return merge_parts(plan_.cluster, lane, team, [&](int rank) { return *device::cluster_shared(own, rank); });
  }

  // Once, after the last slice: others of the cluster may still read this block's shared memory.
  FASTBN_DEVICE void leave() const {
    if (plan_.cluster > 1) device::sync_cluster_after_reads();
  }

 private:
  static FASTBN_DEVICE int block() { return device::opaque(static_cast<int>(device::block_x())); }

  FASTBN_DEVICE bool cooperative() const { return plan_.schedule == Schedule::cooperative; }

  FASTBN_DEVICE uint32_t* counter() const { return workspace_ + block() / plan_.splits * counter_words; }

  FASTBN_DEVICE Sums* shared_buffer(int slice) const { return shared_ + slice % 2 * plan_.channels_per_tile; }

  FASTBN_DEVICE Sums& at(int block, int channel, int slice) const {
    Sums* const parts = reinterpret_cast<Sums*>(workspace_ + plan_.groups * counter_words);
    return parts[(int64_t(slice % 2) * plan_.groups * plan_.splits + block) * plan_.channels_per_tile + channel];
  }

  const Plan& plan_;
  Sums* shared_;
  uint32_t* workspace_;
  int slices_ = 0;
};

}  // namespace fastbn::cuda
