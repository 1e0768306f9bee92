// The choice of a CUDA plan: a pure function of layout, dtype, direction, epilogue, alignment and device limits, so
// that it can be tested and explained without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/device.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"
#include "plan/traffic.h"
#include "plan/walk.h"

namespace fastbn {

inline Plan choose_plan(const Request& given, const DeviceLimits& limits) {
  Request request = given;
  if (request.direction == Direction::forward) {
    // Statistics have the same bits with and without a residual, and where possible with and without a mask.
    request.residual = false;
    request.masked = request.masked && request.layout.run() % vec_size != 0;
  }
  Plan plan = choose_walk(request);
  plan.tiles = std::max(plan.tiles, 1);
  plan.groups = plan.tiles;
  // Blocks of a two-phase plan per SM: as many as its registers hold (row_tiles), or two waves of that.
  const int64_t wanted_blocks = int64_t(limits.sm_count) * (plan.kernel == Kernel::row_tiles ? 4 : 8);
  // Estimate: a split of fewer than four vectors per thread is not worth its block.
  const int64_t max_splits = std::clamp<int64_t>(vectors_per_thread(request.layout, plan, 1) / 4, 1, 1024);
  plan.splits = static_cast<int>(std::clamp<int64_t>(wanted_blocks / plan.tiles, 1, max_splits));
  add_shared_bytes(request, plan);
  add_traffic(given, plan);
  return plan;
}

}  // namespace fastbn
