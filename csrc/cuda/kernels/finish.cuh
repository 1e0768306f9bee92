// The second launch of two-phase plans: adds up the partial sums of a channel over the splits, one warp per channel,
// and computes the results of the op from them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/block/reduce.cuh"
#include "cuda/device/device.cuh"
#include "math/sums.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Adds up the parts of each channel; one thread per channel calls finish(params, sums), of a Finish that was made of
// what the launch before it does not write. Where nvcc is not told that four blocks per SM are enough, it aims at more
// and spills.
template <class Params, class Finish>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, 4) finish_kernel(Params params, int splits, const Sums* partials) {
  const int64_t channels = params.layout.channels;
  const int64_t channel =
      device::block_x() * (device::block_threads() / device::kWarp) + device::thread_index() / device::kWarp;
  const int lane = device::thread_index() % device::kWarp;
  device::allow_next_launch();
  const Finish finish(params, channel < channels ? channel : channels - 1);
  device::wait_for_previous_launch();
  if (channel >= channels) return;
  const Sums sums =
      merge_parts(splits, lane, device::kWarp, [&](int split) { return partials[split * channels + channel]; });
  if (lane == 0) finish(params, channel, sums);
}

template <class Finish, class Params>
cudaError_t launch_finish(const Params& params, const Plan& plan, const Sums* partials, cudaStream_t stream) {
  constexpr int warps = 4;
  device::Launch shape;
  shape.grid_x = std::max<int64_t>(1, (params.layout.channels + warps - 1) / warps);
  shape.threads = warps * device::kWarp;
  shape.overlaps_previous = true;
  return device::launch(&finish_kernel<Params, Finish>, shape, stream, params, plan.splits, partials);
}

}  // namespace fastbn::cuda
