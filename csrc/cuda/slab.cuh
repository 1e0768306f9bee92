// What a block keeps on chip between the pass for the sums and the last one. Each thread has places for octets of its
// own walk, so that no barrier stands between bringing one in and using it, nor between its last use and bringing
// another one into its place. They are brought in by asynchronous copies and awaited in stages.
//
// The places are a ring. Both passes visit all octets of the slice, and what is visited gives its place to what is
// needed as many visits later as there are places: in the first pass to an octet that had none yet, until the last ones
// stay; in the last pass, which begins with those, to the octets that did not stay, backwards; and then to the first
// ones of the next slice. Where there is a place for every octet that is just: to the same octet of the next slice.
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

  // The octets of a walk that have places at a time.
  template <class Walk>
  FASTBN_DEVICE int kept(const Walk& walk) const {
    return walk.octets() < plan_.slots ? walk.octets() : plan_.slots;
  }

  // In what follows fetch(step, place, is_last) brings an octet in; is_last where others are read again, but it is not.
  // `visit` counts a pass from 0.

  // Begins with a slice: calls fetch for as many of its octets as there are places.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void bring(Walk walk, Fetch fetch) {
    const int octets = walk.octets(), count = kept(walk);
    for (int number = 0; number < count; ++number) {
      fetch(walk.step(), place_, stays(number, octets));
      walk.next();
      leave(count);
    }
    close(count);
  }

  // Where the next octet of the pass lies; it has arrived.
  FASTBN_DEVICE int await() {
    if (visited_ == 0) device::copy_async_wait<copy_stages - 1>();
    return place_;
  }

  // Between the passes: with the last one begins a stage, so that the next slice finds its octets in whole ones.
  FASTBN_DEVICE void begin_last_pass() {
    if (visited_ > 0) close_stage();
  }

  // The octet has been summed.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void after_sums(const Walk& walk, const Step& step, int visit, Fetch fetch) {
    if constexpr (Walk::by_rows) {
      const int octets = walk.octets(), next = visit + plan_.slots;
      if (next < octets) fetch(walk.further(step, plan_.slots), place_, stays(next, octets));
    }
    leave(kept(walk));
  }

  // The octet's output has been made; a pass of KeptFirst visits it.
  template <class Walk, class Fetch>
  FASTBN_DEVICE void after_output(const Walk& walk, const Step& step, int visit, Fetch fetch) {
    const int count = kept(walk);
    Step next = step;
    bool is_last = false;
    if constexpr (Walk::by_rows) {
      const int octets = walk.octets(), later = visit + count;
      const auto number = [&](int v) { return v < count ? octets - count + v : octets - 1 - v; };
      if (later < octets) {
        next = walk.further(step, number(later) - number(visit));
        is_last = true;
      } else {
        next = walk.ahead(step, plan_.groups);  // which may be narrower
        next.offset = walk.further(next, later - octets - number(visit)).offset;
        is_last = stays(later - octets, octets);
      }
    } else {
      next = walk.ahead(step, plan_.groups);
    }
    if (next.count > 0) fetch(next, place_, is_last);
    leave(count);
  }

  // The last pass over a slice is done.
  template <class Walk>
  FASTBN_DEVICE void close(const Walk& walk) {
    close(kept(walk));
  }

  FASTBN_DEVICE void fetch(int place, int tensor, const T* from, int count, bool vectorized, bool is_last) const {
    if (vectorized && count == octet) {
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) {
        const T* const source = from + part * Vector::size;
        is_last ? device::copy_async16_last(at(place, tensor, part), source)
                : device::copy_async16(at(place, tensor, part), source);
      }
    } else {
      const Octet<T> value = load_octet(from, count, false);
      FASTBN_UNROLL
      for (int part = 0; part < parts; ++part) *at(place, tensor, part) = value.part[part];
    }
  }

  FASTBN_DEVICE Octet<T> load(int place, int tensor) const {
    Octet<T> value;
    FASTBN_UNROLL
    for (int part = 0; part < parts; ++part) value.part[part] = *at(place, tensor, part);
    return value;
  }

 private:
  using Vector = device::Vector16<T>;
  static constexpr int parts = octet / Vector::size;

  // Whether an octet of the first pass is one of those that keep their places while others leave.
  FASTBN_DEVICE bool stays(int number, int octets) const {
    return octets > plan_.slots && number >= octets - plan_.slots;
  }

  // On to the next place of so many.
  FASTBN_DEVICE void leave(int count) {
    if (++place_ == count) place_ = 0;
    if (++visited_ == plan_.slots_a_stage()) close_stage();
  }

  // However little a stage brings in, it is a group of copies. So when a stage begins, all that its visits need came in
  // groups before the latest copy_stages - 1.
  FASTBN_DEVICE void close_stage() {
    device::copy_async_commit();
    visited_ = 0;
  }

  // Stages that have no octets count as well.
  FASTBN_DEVICE void close(int count) {
    if (visited_ > 0) close_stage();
    const int each = plan_.slots_a_stage();
    for (int stage = (count + each - 1) / each; stage < copy_stages; ++stage) close_stage();
  }

  // Neighbouring threads lie side by side: no bank conflicts.
  FASTBN_DEVICE Vector* at(int place, int tensor, int part) const {
    return own_ + ((place * plan_.tensors + tensor) * parts + part) * device::block_threads();
  }

  Vector* own_;
  const Plan& plan_;
  int place_ = 0;    // of the octet that is visited next
  int visited_ = 0;  // octets of this stage
};

}  // namespace fastbn::cuda
