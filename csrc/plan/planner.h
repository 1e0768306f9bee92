// The choice of a CUDA plan: a pure function of layout, dtype, direction, epilogue, alignment and device limits, so
// that it can be tested and explained without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/candidates.h"
#include "plan/cost.h"
#include "plan/device.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"
#include "plan/traffic.h"
#include "plan/walk.h"

namespace fastbn {

// Returns the candidate with the lowest predicted time, among this two-phase plan and the one-pass plans. Ties go to
// the earlier candidate.
inline Plan fastest(const Request& request, const DeviceLimits& limits, const Plan& two_phase) {
  const bool reduces = request.direction == Direction::forward || request.direction == Direction::backward;
  if (!reduces || !request.fused || request.layout.numel() == 0) return two_phase;
  // Keeping a part and reading the rest again takes 0.93 of the time of two phases in backward of half types (geometric
  // mean of 38 cases on an H200), but 1.4 times that of float32, 1.2 with a residual, and 1.1 in forward with one.
  const bool parts_pay = request.direction == Direction::backward && element_size(request.dtype) == 2 &&
                         !request.residual && !request.masked;
  Plan best = two_phase;
  double best_us = predicted_us(request, limits, best);
  for_each_one_pass_plan(request, limits, two_phase, parts_pay, [&](Plan candidate) {
    add_traffic(request, candidate);
    const double us = predicted_us(request, limits, candidate);
    if (us < best_us) best = candidate, best_us = us;
  });
  return best;
}

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
  add_traffic(request, plan);
  add_shared_bytes(request, plan);
  plan = fastest(request, limits, plan);
  add_traffic(given, plan);
  return plan;
}

}  // namespace fastbn
