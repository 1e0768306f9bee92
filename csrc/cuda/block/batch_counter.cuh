// num_batches_tracked in a launch of many blocks. A cumulative average needs its old value in every block, so it is
// incremented after the last block has read it. It never holds anything but its old and its new value: a launch that is
// killed leaves a counter that a checkpoint may keep.
#pragma once

#include <cstdint>

#include "cuda/device/device.cuh"
#include "math/params.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Returns whether the blocks of a one-pass launch have to count themselves, because no barrier that they pass anyway
// shows that all of them have read the counter. Blocks of one cluster pass its barrier, those of a cooperative grid the
// grid's.
FASTBN_INLINE bool needs_ticket(const ForwardParams& params, const Plan& plan) {
  return params.num_batches_tracked && !params.has_momentum && plan.schedule == Schedule::resident && plan.groups > 1;
}

class BatchCounter {
 public:
  // `ticket` is 0 where needs_ticket says so, and not used elsewhere.
  FASTBN_DEVICE BatchCounter(const ForwardParams& params, const Plan& plan, uint32_t* ticket)
      : counter_(params.num_batches_tracked),
        ticket_(needs_ticket(params, plan) ? ticket : nullptr),
        is_cumulative_(!params.has_momentum) {}

  // Returns the number of batches, this one included, or 0 if it is not needed. Call it before `increment`.
  FASTBN_DEVICE int64_t number() const { return counter_ && is_cumulative_ ? *counter_ + 1 : 0; }

  // Counts this batch, once. Call it in all threads, after `number` and then a barrier of the cluster and, in a
  // cooperative launch, of the grid.
  FASTBN_DEVICE void increment() const {
    if (!counter_ || device::thread_index() != 0) return;
    const bool is_last = ticket_ ? device::atomic_add(ticket_, 1) + 1 == device::grid_x() : device::block_x() == 0;
    if (is_last) ++*counter_;
  }

 private:
  int64_t* counter_;
  uint32_t* ticket_;
  bool is_cumulative_;
};

}  // namespace fastbn::cuda
