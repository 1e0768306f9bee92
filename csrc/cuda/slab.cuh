// What a block keeps on chip between the pass for the sums and the last one. Each thread keeps the octets of its own
// walk, so that no barrier stands between bringing one in and using it. They are brought in by asynchronous copies, all
// under way at once, and awaited in stages.
#pragma once

#include "cuda/device.cuh"
#include "cuda/octet.cuh"
#include "cuda/walk.cuh"
#include "math/plan.h"

namespace fastbn::cuda {

template <class T>
class Slab {
 public:
  FASTBN_DEVICE Slab(void* memory, const Plan& plan)
      : own_(static_cast<Vector*>(memory) + device::thread_index()),
        threads_(device::block_threads()),
        tensors_(plan.tensors),
        slots_a_stage_((plan.slots + stages - 1) / stages) {}

  // Calls fetch(step, slot) for every octet of the walk.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void bring(Walk walk, Fetch fetch) const {
    int slot = 0;
    FASTBN_KEEP_LOOP
    for (int stage = 0; stage < stages; ++stage) {
      for (const int end = slot + slots_a_stage_; slot < end && walk.more(); ++slot) {
        fetch(walk.step(), slot);
        walk.next();
      }
      device::copy_async_commit();
    }
  }

  FASTBN_DEVICE void fetch(int slot, int tensor, const T* from, int count, bool vectorized) const {
    if (vectorized) {
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) {
        device::copy_async16(at(slot, tensor, part), from + part * Vector::size);
      }
    } else {
      const Octet<T> value = load_octet(from, count, false);
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) *at(slot, tensor, part) = value.part[part];
    }
  }

  // Waits for the stage of a slot, once. To be called for the slots in ascending order.
  FASTBN_DEVICE void await(int slot) {
    if (slot < arrived_) return;
    switch (stage_++) {
      case 0: device::copy_async_wait<stages - 1>(); break;
      case 1: device::copy_async_wait<stages - 2>(); break;
      case 2: device::copy_async_wait<stages - 3>(); break;
      default: device::copy_async_wait<0>(); break;
    }
    arrived_ += slots_a_stage_;
  }

  FASTBN_DEVICE Octet<T> load(int slot, int tensor) const {
    Octet<T> value;
    FASTBN_UNROLL
    for (int part = 0; part < parts; ++part) value.part[part] = *at(slot, tensor, part);
    return value;
  }

 private:
  using Vector = device::Vector16<T>;
  static constexpr int parts = octet / Vector::size;
  // Estimate: the first sums begin when a quarter is there.
  static constexpr int stages = 4;

  // Neighbouring threads lie side by side: no bank conflicts.
  FASTBN_DEVICE Vector* at(int slot, int tensor, int part) const {
    return own_ + int64_t((slot * tensors_ + tensor) * parts + part) * threads_;
  }

  Vector* own_;
  int threads_, tensors_, slots_a_stage_;
  int stage_ = 0, arrived_ = 0;
};

// The merged value of a channel over the blocks of the cluster, in the order of their ranks. `own` is this block's, in
// shared memory, and a sync_cluster lies between its writing and this.
template <class V, class Merge>
FASTBN_DEVICE V merge_cluster(V* own, Merge merge) {
  V value = *device::cluster_shared(own, 0);
  for (int rank = 1; rank < device::cluster_blocks(); ++rank) value = merge(value, *device::cluster_shared(own, rank));
  return value;
}

}  // namespace fastbn::cuda
