// The exchange of partial sums among the blocks of a channel tile: through distributed shared memory if they are a
// cluster, through global memory if they are a group of a cooperative grid. Two buffers alternate, so that a tile costs
// one barrier: before a block writes a buffer again, all its readers have reached the barrier in between.
#pragma once

#include "cuda/block/reduce.cuh"
#include "cuda/device/device.cuh"
#include "math/sums.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Words per group's counter: a cache line, so that groups do not share one.
constexpr int64_t counter_words = 32;

class PartialExchange {
 public:
  // `shared` is SharedMemoryMap::exchange. `workspace` has, in cooperative plans, one counter per group, then the sums
  // as [2 buffers, groups, splits, channels per tile]. Keeps a reference to the plan, which is a parameter of the
  // kernel.
  FASTBN_DEVICE PartialExchange(const Plan& plan, Sums* shared, void* workspace)
      : plan_(plan), shared_(shared), workspace_(static_cast<uint32_t*>(workspace)) {}

  // Clears the group's counter. Call it once, before the first exchange.
  FASTBN_DEVICE void init() const {
    if (!cooperative()) return;
    if (is_leader() && device::thread_index() == 0) *counter() = 0;
    device::sync_grid();
  }

  // Returns the number of exchanges completed.
  FASTBN_DEVICE int count() const { return count_; }

  // Returns whether this block writes the results that a tile has once.
  FASTBN_DEVICE bool is_leader() const { return block() % plan_.splits == 0; }

  // Sets this block's part of the sums of a channel of the tile.
  FASTBN_DEVICE void publish(int channel, const Sums& sums) const { block_sums(channel) = sums; }

  // Waits until all blocks of the tile have published their parts.
  FASTBN_DEVICE void sync() {
    ++count_;
    if (cooperative()) {
      device::sync_blocks(counter(), plan_.splits, count_);
    } else if (plan_.cluster > 1) {
      device::sync_cluster();
    } else {
      device::sync_block();
    }
  }

  // Returns the sums of a channel over all blocks of the tile. Call it after sync, in all lanes of a team, which share
  // the work and all get the result.
  FASTBN_DEVICE Sums reduce(int channel, int lane, int team) const {
    const int exchange = count_ - 1;
    if (cooperative()) {
      const Sums* const parts = &global_sums(block() / plan_.splits * plan_.splits, channel, exchange);
      return merge_parts(plan_.splits, lane, team, [&](int rank) { return parts[rank * plan_.channels_per_tile]; });
    }
    Sums* const local = shared_buffer(exchange) + channel;
    if (plan_.cluster == 1) return *local;
    return merge_parts(plan_.cluster, lane, team, [&](int rank) { return *device::cluster_shared(local, rank); });
  }

  // Waits for the cluster, whose other blocks may still read this block's shared memory. Call it once, at the end.
  FASTBN_DEVICE void finish() const {
    if (plan_.cluster > 1) device::sync_cluster_after_reads();
  }

 private:
  static FASTBN_DEVICE int block() { return device::opaque(static_cast<int>(device::block_x())); }

  FASTBN_DEVICE bool cooperative() const { return plan_.schedule == Schedule::cooperative; }

  FASTBN_DEVICE uint32_t* counter() const { return workspace_ + block() / plan_.splits * counter_words; }

  FASTBN_DEVICE Sums* shared_buffer(int exchange) const { return shared_ + exchange % 2 * plan_.channels_per_tile; }

  FASTBN_DEVICE Sums& block_sums(int channel) const {
    return cooperative() ? global_sums(block(), channel, count_) : shared_buffer(count_)[channel];
  }

  FASTBN_DEVICE Sums& global_sums(int block, int channel, int exchange) const {
    Sums* const parts = reinterpret_cast<Sums*>(workspace_ + plan_.groups * counter_words);
    return parts[(int64_t(exchange % 2) * plan_.groups * plan_.splits + block) * plan_.channels_per_tile + channel];
  }

  const Plan& plan_;
  Sums* shared_;
  uint32_t* workspace_;
  int count_ = 0;
};

}  // namespace fastbn::cuda
