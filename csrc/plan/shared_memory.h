// The map of a block's dynamic shared memory. The planner sizes plans by it, launches ask for its bytes, and kernels
// find their arrays through it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/affine.h"
#include "math/grad_coefficients.h"
#include "plan/plan.h"

namespace fastbn {

// `count` elements of T, `offset` bytes from the start of shared memory.
template <class T>
struct SharedArray {
  int64_t offset = 0, count = 0;

  FASTBN_INLINE int64_t end() const { return offset + count * int64_t(sizeof(T)); }
  FASTBN_INLINE T* in(void* memory) const { return reinterpret_cast<T*>(static_cast<char*>(memory) + offset); }
};

// The first part of the shared memory of every kernel that reduces: float64 totals, two per thread and channel of it.
template <int channels_per_thread>
struct ReduceMemory {
  double first[channels_per_thread][max_threads];
  double second[channels_per_thread][max_threads];
  uint32_t votes[max_threads / 32];  // one word per warp
  double elements_per_channel;       // of the block; in registers it would take a pair during the loops
};

// Room for a kernel's numbers per channel of the tile, beside the sums: pivot or coefficients.
struct alignas(8) ChannelScratch {
  double numbers[4];
};

// The map of a pass that reduces.
struct ReduceMap {
  SharedArray<ChannelScratch> scratch;  // per channel of the tile, after ReduceMemory

  // `channels` is channels_per_thread(plan.kernel): a constant where a kernel passes it.
  FASTBN_INLINE ReduceMap(const Plan& plan, int channels)
      : scratch{channels == 1 ? int64_t(sizeof(ReduceMemory<1>)) : int64_t(sizeof(ReduceMemory<vec_size>)),
                plan.channels_per_tile} {}

  // Returns the scratch memory as the kernel's own type.
  template <class U>
  FASTBN_INLINE U* scratch_in(void* memory) const {
    static_assert(sizeof(U) <= sizeof(ChannelScratch) && alignof(U) <= alignof(ChannelScratch));
    return reinterpret_cast<U*>(scratch.in(memory));
  }

  FASTBN_INLINE int64_t bytes() const { return scratch.end(); }
};

// The map of a last pass over the elements: the coefficients of the block's channels, after a word per warp where these
// depend on a vote (`has_votes`).
template <class Coefficients, bool has_votes = false>
struct LastPassMap {
  SharedArray<uint32_t> votes{0, has_votes ? max_threads / 32 : 0};
  SharedArray<Coefficients> coefficients;

  FASTBN_INLINE explicit LastPassMap(const Plan& plan) : coefficients{votes.end(), plan.channels_per_tile} {}

  FASTBN_INLINE int64_t bytes() const { return coefficients.end(); }
};

// Gradients in float32 have two forms; the block votes on which one a tile takes.
template <class A>
using InputGradMap = LastPassMap<GradCoefficients<A>, sizeof(A) == sizeof(float)>;

// Returns the maximum shared memory per block over the launches of the plan, in bytes.
template <class T>
int64_t shared_bytes_of(const Plan& plan, Direction direction) {
  using A = acc_t<T>;
  const int64_t reduce_bytes = ReduceMap(plan, channels_per_thread(plan.kernel)).bytes();
  switch (direction) {
    case Direction::eval: return LastPassMap<Affine<A>>(plan).bytes();
    case Direction::forward: return std::max(reduce_bytes, LastPassMap<Affine<A>>(plan).bytes());
    case Direction::backward:
    case Direction::frozen_backward: break;
  }
  return std::max(reduce_bytes, InputGradMap<A>(plan).bytes());
}

inline void add_shared_bytes(const Request& request, Plan& plan) {
  const auto bytes_of = [&]<class T>() { plan.shared_bytes = shared_bytes_of<T>(plan, request.direction); };
  switch (request.dtype) {
    case DType::float32: return bytes_of.template operator()<float>();
    case DType::float64: return bytes_of.template operator()<double>();
    case DType::bfloat16: return bytes_of.template operator()<bfloat16>();
    case DType::float16: return bytes_of.template operator()<float16>();
  }
}

}  // namespace fastbn
