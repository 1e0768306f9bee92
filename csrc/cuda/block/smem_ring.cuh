// What a block keeps on chip between the pass for the sums and the last one. Each thread has places for octets of its
// own walk, so that no barrier stands between bringing one in and using it, nor between its last use and bringing
// another one into its place. They are brought in by asynchronous copies and awaited in stages.
//
// The places are a ring. Both passes visit all octets of the slice, and what is visited gives its place to what is
// needed as many visits later as there are places: in the first pass to an octet that had none yet, until the last ones
// stay; in the last pass, which begins with those, to the octets that did not stay, backwards; and then to the first
// ones of the next slice. Where there is a place for every octet that is just: to the same octet of the next slice.
#pragma once

#include "cuda/block/vec8.cuh"
#include "cuda/block/walk.cuh"
#include "cuda/device/device.cuh"
#include "plan/plan.h"

namespace fastbn::cuda {

template <class T>
class SmemRing {
 public:
  // Holds on to the plan, which lies in the kernel's parameters.
  FASTBN_DEVICE SmemRing(void* memory, const Plan& plan)
      : own_(static_cast<Vector*>(memory) + device::thread_index()), plan_(plan) {}

  // The octets of a walk that have places at a time.
  template <class Walk>
  FASTBN_DEVICE int kept(const Walk& walk) const {
    return walk.octets() < plan_.slots ? walk.octets() : plan_.slots;
  }

  // In what follows fetch(step, place) brings an octet in, and `visit` counts a pass from 0.

  // Begins with a slice: calls fetch for as many of its octets as there are places.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void bring(Walk walk, Fetch fetch) {
    const int count = kept(walk);
    FASTBN_KEEP_LOOP
    for (int number = 0; number < count; ++number) {
      fetch(walk.step(), place_);
      walk.next();
      pass(count);
      leave(1);
    }
    close(count);
  }

  // Waits for the octets of a stage before the first of them is visited.
  FASTBN_DEVICE void await() const {
    if (visited_ == 0) device::copy_async_wait<copy_stages - 1>();
  }

  // On to the next of so many places.
  FASTBN_DEVICE void pass(int count) {
    place_ += vectors_a_place();
    if (place_ == count * vectors_a_place()) place_ = 0;
  }

  // So many octets, all of one stage, have been visited.
  FASTBN_DEVICE void leave(int octets) {
    visited_ += octets;
    if (visited_ == plan_.slots_per_stage) close_stage();
  }

  // Between the passes: with the last one begins a stage, so that the next slice finds its octets in whole ones.
  template <class Walk>
  FASTBN_DEVICE void begin_last_pass(const Walk& walk) {
    if (visited_ > 0) close_stage();
    to_next_slice_ = walk.distance(plan_.groups);
    has_next_slice_ = walk.reaches(plan_.groups);
  }

  // The octet has been summed.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void after_sums(const Walk& walk, const Step& step, int visit, Fetch fetch) {
    if constexpr (Walk::by_rows) {
      if (visit + plan_.slots < walk.octets()) fetch(walk.further(step, plan_.slots), place_);
    }
  }

  // The octet's output has been made; a pass of ResidentFirst visits it.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void after_output(const Walk& walk, const Step& step, int visit, Fetch fetch) {
    const int count = kept(walk);
    Step next = step;
    bool exists = true;
    if constexpr (Walk::by_rows) {
      const int octets = walk.octets(), later = visit + count;
      if (octets > count) {
        const auto number = [&](int v) { return v < count ? octets - count + v : octets - 1 - v; };
        const int to = later < octets ? number(later) : later - octets;
        next = walk.further(step, to - number(visit));
      }
      exists = later < octets;
    } else {
      exists = false;
    }
    if constexpr (Walk::aligned) {
      if (!exists && has_next_slice_) {
        next.offset += to_next_slice_;
        exists = true;
      }
    } else if (!exists && walk.reaches(plan_.groups)) {
      next.offset += walk.distance(plan_.groups);
      next = walk.ahead(next, plan_.groups);
      exists = next.count > 0;
    }
    if (exists) fetch(next, place_);
  }

  // The last pass over a slice is done.
  template <class Walk>
  FASTBN_DEVICE void close(const Walk& walk) {
    close(kept(walk));
  }

  template <bool aligned>
  FASTBN_DEVICE void fetch(int place, int tensor, const T* from, int count, bool vectorized) const {
    if (aligned || (vectorized && count == vec_size)) {
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) {
        device::copy_async16(at(place, tensor, part), reinterpret_cast<const Vector*>(from) + part);
      }
    } else {
      const Vec8<T> value = load_vec<false>(from, count, false);
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) *at(place, tensor, part) = value.part[part];
    }
  }

  // From the place of the octet that is visited.
  FASTBN_DEVICE Vec8<T> load(int tensor) const {
    Vec8<T> value;
    FASTBN_UNROLL
    for (int part = 0; part < parts; ++part) value.part[part] = *at(place_, tensor, part);
    return value;
  }

 private:
  using Vector = typename Vec8<T>::Vector;
  static constexpr int parts = Vec8<T>::vectors;

  // However little a stage brings in, it is a group of copies. So when a stage begins, all that its visits need came in
  // groups before the latest copy_stages - 1.
  FASTBN_DEVICE void close_stage() {
    device::copy_async_commit();
    visited_ = 0;
  }

  // Stages that have no octets count as well.
  FASTBN_DEVICE void close(int count) {
    if (visited_ > 0) close_stage();
    const int each = plan_.slots_per_stage;
    for (int stage = (count + each - 1) / each; stage < copy_stages; ++stage) close_stage();
  }

  // Neighbouring threads lie side by side: no bank conflicts.
  FASTBN_DEVICE int vectors_a_place() const { return plan_.resident_tensors * parts * plan_.threads; }
  FASTBN_DEVICE Vector* at(int place, int tensor, int part) const {
    return own_ + place + (tensor * parts + part) * plan_.threads;
  }

  Vector* own_;
  const Plan& plan_;
  int place_ = 0;              // of the octet that is visited next, in vectors
  int visited_ = 0;            // octets of this stage
  int64_t to_next_slice_ = 0;  // of whole walks: what others find again each time, to have registers left
  bool has_next_slice_ = false;
};

// What is loaded beside what the ring has.
struct Nothing {};

// Calls use(step, load(step)) and then after(step, visit) for every octet of a walk, which lies in the ring's place;
// `batch` octets, a part of a stage, are loaded side by side.
template <int batch, class Walk, class T, class Load, class Use, class After>
FASTBN_DEVICE void for_each_in_ring(Walk walk, SmemRing<T>& ring, Load load, Use use, After after) {
  static_assert(unroll_of(sizeof(T)) % batch == 0);
  const int count = ring.kept(walk);
  int visit = 0;
  for_each_batch<batch>(
      walk, load, [&] { ring.await(); },
      [&](const Step& step, const auto& item) {
        use(step, item);
        after(step, visit++);
        ring.pass(count);
      },
      [&](int octets) { ring.leave(octets); });
}

}  // namespace fastbn::cuda
