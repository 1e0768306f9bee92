// The launches that plans consist of, and the dispatch from a plan to the instance of a kernel. A pass over the
// elements takes the plan's grid, a finishing pass one warp per channel.
//
// The launches of an op overlap (programmatic dependent launch). The first is an ordinary one: what earlier ops wrote
// is there when it begins, and so when any of the others does. Of what the op itself writes, a launch reads only what
// the one before it wrote, and all threads of the second and third wait for that one to end before they read such
// values or write anything. So the third begins its writes when the second has ended, which has itself waited for the
// first: nothing is overwritten that another launch still reads. The next op, whose tensors and workspace may be this
// one's memory, begins with an ordinary launch, which waits for all of this.
#pragma once

#include <cassert>
#include <cstdint>

#include "cuda/block/walk.cuh"
#include "cuda/device/device.cuh"
#include "math/params.h"
#include "math/sums.h"
#include "plan/occupancy.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"
#include "plan/stream.h"
#include "plan/walk.h"

namespace fastbn::cuda {

// Launches the first pass of a two-phase forward. Partial sums are laid out as [splits, channels].
cudaError_t launch_moments(const ForwardParams& params, const Plan& plan, Sums* partials, cudaStream_t stream);
cudaError_t launch_finish_moments(const ForwardParams& params, const Plan& plan, const Sums* partials,
                                  cudaStream_t stream);
// `finished`: launch_finish_moments comes right before it.
cudaError_t launch_normalize(const ForwardParams& params, const Plan& plan, bool finished, cudaStream_t stream);

cudaError_t launch_grad_sums(const BackwardParams& params, const Plan& plan, Sums* partials, cudaStream_t stream);
// Writes sum_grad, sum_grad_xhat, grad_weight and grad_bias where they are not null.
cudaError_t launch_finish_grad_sums(const BackwardParams& params, const Plan& plan, const Sums* partials,
                                    cudaStream_t stream);
// Writes grad_input and grad_residual. A null sum_grad means frozen statistics, a null count that of the layout.
// `finished`: launch_finish_grad_sums comes right before it.
cudaError_t launch_input_grad(const BackwardParams& params, const Plan& plan, bool finished, cudaStream_t stream);

// The launch bound of the kernel of a pass.
template <class T, class Walk>
FASTBN_INLINE constexpr int blocks_per_sm(Pass pass) {
  return compiled_blocks_per_sm(pass, Walk::kind, sizeof(T), Walk::aligned);
}

// Run a stream plan, with the statistics of the batch. `messages` is the workspace of message_bytes. Backward must want
// grad_input.
cudaError_t launch_stream_forward(const ForwardParams& params, const Plan& plan, void* messages, cudaStream_t stream);
cudaError_t launch_stream_backward(const BackwardParams& params, const Plan& plan, void* messages, cudaStream_t stream);

// Calls run.operator()<T, kernel>() with the type of the elements and the kernel of a stream plan.
template <class Run>
cudaError_t dispatch_stream(DType dtype, const Plan& plan, Run run) {
  const auto with_kernel = [&]<class T>() {
    return plan.kernel == Kernel::row_tiles ? run.template operator()<T, Kernel::row_tiles>()
                                            : run.template operator()<T, Kernel::channel_tiles>();
  };
  switch (dtype) {
    case DType::float32: return with_kernel.template operator()<float>();
    case DType::float64: return cudaErrorInvalidValue;
    case DType::bfloat16: return with_kernel.template operator()<bfloat16>();
    case DType::float16: return with_kernel.template operator()<float16>();
  }
  return cudaErrorInvalidValue;
}

// Calls run.operator()<T, Walk>() with the type of the elements and the plan's walk.
template <class Run>
cudaError_t dispatch(DType dtype, const Layout& layout, const Plan& plan, Run run) {
  const auto with_kernel = [&]<class T, bool aligned>() {
    return plan.kernel == Kernel::row_tiles ? run.template operator()<T, Walk<Kernel::row_tiles, aligned>>()
                                            : run.template operator()<T, Walk<Kernel::channel_tiles, aligned>>();
  };
  const auto with_walk = [&]<class T>() {
    return is_aligned_walk(plan, layout) ? with_kernel.template operator()<T, true>()
                                         : with_kernel.template operator()<T, false>();
  };
  switch (dtype) {
    case DType::float32: return with_walk.template operator()<float>();
    case DType::float64: return with_walk.template operator()<double>();
    case DType::bfloat16: return with_walk.template operator()<bfloat16>();
    case DType::float16: return with_walk.template operator()<float16>();
  }
  return cudaErrorInvalidValue;
}

// Checks that kernels can run a plan: warps merge by halving, which takes full warps, and kernels count channels and
// the elements of a row in int.
inline bool is_runnable(const Plan& plan, const Layout& layout) {
  if (plan.schedule == Schedule::stream) return is_live(plan.stream) && layout.channels <= INT32_MAX;
  const bool threads = plan.threads > 0 && plan.threads <= max_threads && plan.threads % device::kWarp == 0;
  const bool rows =
      plan.kernel == Kernel::channel_tiles || plan.row_width == plan.fold * layout.channels * layout.inner;
  return threads && rows && plan.vectors_per_row >= 1 && plan.vectors_per_row <= plan.threads &&
         plan.items == plan.work_items(layout) && plan.items_per_split * plan.splits >= plan.items &&
         plan.last_splits >= 1 && layout.channels <= INT32_MAX;
}

inline device::Launch grid_of(const Plan& plan, int64_t shared_bytes) {
  assert(shared_bytes <= plan.shared_bytes);
  device::Launch shape;
  shape.grid_x = int64_t(plan.groups) * plan.splits;
  shape.threads = plan.threads;
  shape.shared_bytes = shared_bytes;
  return shape;
}

// Returns a plan for the last pass, and the shape of its launch.
inline Plan last_pass_of(const Plan& plan, const Layout& layout) {
  Plan last = plan;
  last.set_splits(layout, plan.last_splits);
  return last;
}

inline device::Launch last_shape(const Plan& last, int64_t shared_bytes, bool finished) {
  device::Launch shape = grid_of(last, shared_bytes);
  shape.overlaps_previous = finished;
  return shape;
}

// Returns the shape of a launch that reduces.
inline device::Launch reduce_shape(const Plan& plan) {
  return grid_of(plan, ReduceMap(plan, channels_per_thread(plan.kernel)).bytes());
}

}  // namespace fastbn::cuda
