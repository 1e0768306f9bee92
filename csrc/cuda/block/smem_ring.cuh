// A ring of slots in shared memory that keeps a channel tile on chip between the pass for the sums and the output pass.
// Each thread has slots for vectors of its own walk, so no barrier stands between loading a vector and using it, nor
// between its last use and the next load into its slot. Vectors arrive by asynchronous copies, awaited in stages.
#pragma once

#include "cuda/block/vec8.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/block/walk.cuh"
#include "cuda/device/device.cuh"
#include "plan/plan.h"
#include "plan/shared_memory.h"

namespace fastbn::cuda {

// A thread's n slots. Visiting vector i frees its slot for vector i + n of the sequence
//   sums of this tile, in order: a thread with more than n vectors ends with the last n in its slots;
//   output of this tile: those n, then the others backwards (ResidentFirst);
//   sums of the group's next tile.
// With a slot for every vector, each slot passes to the same vector of the next tile.
template <class T>
class SmemRing {
 public:
  // Keeps a reference to the plan, which is a parameter of the kernel.
  FASTBN_DEVICE SmemRing(StoredVector<T>* memory, const Plan& plan)
      : thread_memory_(reinterpret_cast<Vector*>(memory) + device::thread_index()), plan_(plan) {}

  // Returns how many vectors of a walk are in slots at a time.
  template <class Walk>
  FASTBN_DEVICE int slots_used(const Walk& walk) const {
    return walk.vectors() < plan_.slots ? walk.vectors() : plan_.slots;
  }

  // In what follows, fetch(step, slot) starts to load a vector, and `visit` counts the vectors of a pass from 0.

  // Starts with the first tile: calls fetch for as many of its vectors as there are slots.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void fill(Walk walk, Fetch fetch) {
    const int count = slots_used(walk);
    FASTBN_KEEP_LOOP
    for (int i = 0; i < count; ++i) {
      fetch(walk.step(), slot_);
      walk.next();
      advance(count);
      release(1);
    }
    close_stages(count);
  }

  // Waits for the vectors of a stage if the first of them is next.
  FASTBN_DEVICE void wait() const {
    if (released_ == 0) device::copy_async_wait<copy_stages - 1>();
  }

  // Moves to the next of `count` slots.
  FASTBN_DEVICE void advance(int count) {
    slot_ += slot_size();
    if (slot_ == count * slot_size()) slot_ = 0;
  }

  // Marks `vectors` vectors of the current stage as consumed; commits the stage when it is full.
  FASTBN_DEVICE void release(int vectors) {
    released_ += vectors;
    if (released_ == plan_.slots_per_stage) commit_stage();
  }

  // Starts the output pass on a stage boundary, so that the next tile's copies fill whole stages.
  template <class Walk>
  FASTBN_DEVICE void begin_output_pass(const Walk& walk) {
    if (released_ > 0) commit_stage();
    to_next_tile_ = walk.offset_to_tile(plan_.groups);
    has_next_tile_ = walk.has_vector_in_tile(plan_.groups);
  }

  // Passes the slot on after the vector has been summed.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void after_sums(const Walk& walk, const Step& step, int visit, Fetch fetch) {
    if constexpr (Walk::by_rows) {
      if (visit + plan_.slots < walk.vectors()) fetch(walk.step_after(step, plan_.slots), slot_);
    }
  }

  // Passes the slot on after the vector's output has been made, in a pass of ResidentFirst.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void after_output(const Walk& walk, const Step& step, int visit, Fetch fetch) {
    const int count = slots_used(walk);
    Step next = step;
    bool exists = true;
    if constexpr (Walk::by_rows) {
      const int vectors = walk.vectors(), later = visit + count;
      if (vectors > count) {
        const auto vector_of = [&](int v) { return v < count ? vectors - count + v : vectors - 1 - v; };
        const int next_vector = later < vectors ? vector_of(later) : later - vectors;
        next = walk.step_after(step, next_vector - vector_of(visit));
      }
      exists = later < vectors;
    } else {
      exists = false;
    }
    if constexpr (Walk::aligned) {
      if (!exists && has_next_tile_) {
        next.offset += to_next_tile_;
        exists = true;
      }
    } else if (!exists && walk.has_vector_in_tile(plan_.groups)) {
      next.offset += walk.offset_to_tile(plan_.groups);
      next = walk.step_in_tile(next, plan_.groups);
      exists = next.count > 0;
    }
    if (exists) fetch(next, slot_);
  }

  // Ends the output pass over a tile.
  template <class Walk>
  FASTBN_DEVICE void finish_tile(const Walk& walk) {
    close_stages(slots_used(walk));
  }

  // Starts to load a vector of one of the plan's resident tensors.
  template <bool aligned>
  FASTBN_DEVICE void fetch(int slot, int tensor, const T* from, int count, bool vectorized) const {
    if (aligned || (vectorized && count == vec_size)) {
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) {
        device::copy_async16(address_of(slot, tensor, part), reinterpret_cast<const Vector*>(from) + part);
      }
    } else {
      const Vec8<T> value = load_vec<false>(from, count, false);
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) *address_of(slot, tensor, part) = value.part[part];
    }
  }

  // Loads the vector that is visited from its slot.
  FASTBN_DEVICE Vec8<T> load(int tensor) const {
    Vec8<T> value;
    FASTBN_UNROLL
    for (int part = 0; part < parts; ++part) value.part[part] = *address_of(slot_, tensor, part);
    return value;
  }

 private:
  using Vector = typename Vec8<T>::Vector;
  static constexpr int parts = Vec8<T>::parts;

  // Commits the copies of a stage as one group, even if there are none. When a stage begins, all vectors that it visits
  // were therefore copied in groups before the latest copy_stages - 1.
  FASTBN_DEVICE void commit_stage() {
    device::copy_async_commit();
    released_ = 0;
  }

  // Commits the stage that is open, and those of a thread with few vectors that have none.
  FASTBN_DEVICE void close_stages(int count) {
    if (released_ > 0) commit_stage();
    const int per_stage = plan_.slots_per_stage;
    for (int stage = (count + per_stage - 1) / per_stage; stage < copy_stages; ++stage) commit_stage();
  }

  // Neighbouring threads are 16 bytes apart: no bank conflicts.
  FASTBN_DEVICE int slot_size() const { return plan_.resident_tensors * parts * plan_.threads; }
  FASTBN_DEVICE Vector* address_of(int slot, int tensor, int part) const {
    return thread_memory_ + slot + (tensor * parts + part) * plan_.threads;
  }

  Vector* thread_memory_;
  const Plan& plan_;
  int slot_ = 0;              // of the vector that is visited next, in 16-byte vectors
  int released_ = 0;          // vectors of this stage
  int64_t to_next_tile_ = 0;  // aligned walks only: the others recompute it, to have registers left
  bool has_next_tile_ = false;
};

// The item of a pass that loads nothing beside the vectors in the ring.
struct Nothing {};

// Calls use(step, load(step)) and then after(step, visit) for every vector of a walk while it is in the ring's slot,
// with `unroll` loads side by side, a fraction of a stage.
template <int unroll, class Walk, class T, class Load, class Use, class After>
FASTBN_DEVICE void for_each_in_ring(Walk walk, SmemRing<T>& ring, Load load, Use use, After after) {
  static_assert(unroll_of(sizeof(T)) % unroll == 0);
  const int count = ring.slots_used(walk);
  int visit = 0;
  for_each_batch<unroll>(
      walk, load, [&] { ring.wait(); },
      [&](const Step& step, const auto& item) {
        use(step, item);
        after(step, visit++);
        ring.advance(count);
      },
      [&](int vectors) { ring.release(vectors); });
}

}  // namespace fastbn::cuda
