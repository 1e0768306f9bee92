// What a block keeps on chip between the pass for the sums and the last one. Each thread keeps the octets of its own
// walk, so that no barrier stands between bringing one in and using it, nor between its last use and bringing the next
// slice's octet into its place. They are brought in by asynchronous copies and awaited in stages.
#pragma once

#include "cuda/device.cuh"
#include "cuda/octet.cuh"
#include "cuda/walk.cuh"
#include "math/plan.h"

namespace fastbn::cuda {

template <class T>
class Slab {
 public:
  // Holds on to the plan, which lies in the kernel's parameters.
  FASTBN_DEVICE Slab(void* memory, const Plan& plan)
      : own_(static_cast<Vector*>(memory) + device::thread_index()), plan_(plan) {}

  // Calls fetch(step, slot) for every octet of the walk, and the slab is whole.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void bring(Walk walk, Fetch fetch) {
    for (int slot = 0; walk.more(); ++slot) {
      fetch(walk.step(), slot);
      brought(slot);
      walk.next();
    }
    close();
  }

  // The octet in a slot has been used: calls fetch(step, slot) for the one at its place in the group's next slice, if
  // there is one. In ascending order of slots, and then `close`.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void replace(const Walk& walk, const Step& step, int slot, Fetch fetch) {
    const Step next = walk.ahead(step, plan_.groups);
    if (next.count == 0) return;
    fetch(next, slot);
    brought(slot);
  }

  FASTBN_DEVICE void close() {
    while (brought_ < stages) close_stage();
    brought_ = awaited_ = arrived_ = 0;
  }

  FASTBN_DEVICE void fetch(int slot, int tensor, const T* from, int count, bool vectorized) const {
    if (vectorized && count == octet) {
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
    switch (awaited_++) {
      case 0: device::copy_async_wait<stages - 1>(); break;
      case 1: device::copy_async_wait<stages - 2>(); break;
      case 2: device::copy_async_wait<stages - 3>(); break;
      default: device::copy_async_wait<0>(); break;
    }
    arrived_ += slots_a_stage();
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

  FASTBN_DEVICE void brought(int slot) {
    if (slot + 1 == (brought_ + 1) * slots_a_stage()) close_stage();
  }

  FASTBN_DEVICE int slots_a_stage() const { return (plan_.slots + stages - 1) / stages; }

  FASTBN_DEVICE void close_stage() {
    device::copy_async_commit();
    ++brought_;
  }

  // Neighbouring threads lie side by side: no bank conflicts.
  FASTBN_DEVICE Vector* at(int slot, int tensor, int part) const {
    return own_ + ((slot * plan_.tensors + tensor) * parts + part) * device::block_threads();
  }

  Vector* own_;
  const Plan& plan_;
  int brought_ = 0;                // stages
  int awaited_ = 0, arrived_ = 0;  // stages, slots
};

}  // namespace fastbn::cuda
