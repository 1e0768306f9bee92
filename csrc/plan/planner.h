// The choice of a CUDA plan: a pure function of layout, dtype, direction, epilogue, alignment and device limits, so
// that it can be tested and explained without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/cost.h"
#include "plan/device.h"
#include "plan/occupancy.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"
#include "plan/stream_candidates.h"
#include "plan/traffic.h"
#include "plan/walk.h"

namespace fastbn {

// Estimate: a split of fewer than two vectors per thread is not worth its block.
inline int64_t max_splits_of(const Layout& layout, const Plan& plan) {
  return std::clamp<int64_t>(vectors_per_thread(layout, plan, 1) / 2, 1, 1024);
}

// Splits each pass of a plan whose traffic is counted.
inline void add_splits(const Request& request, const DeviceLimits& limits, Plan& plan) {
  const bool forward = request.direction == Direction::forward || request.direction == Direction::eval;
  const double tensor_us =
      double(request.layout.numel()) * double(element_size(request.dtype)) / limits.copy_bytes_per_us;
  const int64_t max_splits = max_splits_of(request.layout, plan);
  const auto splits_of = [&](Pass pass, double tensors) {
    const int compiled = compiled_blocks_per_sm(pass, plan.kernel, int64_t(element_size(request.dtype)),
                                                is_aligned_walk(plan, request.layout));
    const bool rows = plan.kernel == Kernel::row_tiles;
    return splits_in_whole_waves(plan.tiles, blocks_per_wave(limits, compiled, plan.shared_bytes), max_splits,
                                 tensors * tensor_us, CostModel().wave_us[rows]);
  };
  const double reads = plan.launches > 1 ? plan.tensor_reads / 2 : plan.tensor_reads;  // of each pass
  plan.set_splits(request.layout, splits_of(forward ? Pass::moments : Pass::grad_sums, reads));
  plan.last_splits = splits_of(forward ? Pass::normalize : Pass::input_grad, reads + plan.tensor_writes);
}

// Returns the candidate with the lowest predicted time, among this two-phase plan and the stream plans. Ties go to the
// earlier candidate.
inline Plan fastest(const Request& request, const DeviceLimits& limits, const Plan& two_phase) {
  Plan best = two_phase;
  double best_us = predicted_two_phase_us(request, limits, two_phase);
  for_each_stream_plan(request, limits, two_phase, Ahead::most, [&](const Plan& candidate) {
    const double us = predicted_stream_us(request, limits, candidate);
    if (us < best_us) best = candidate, best_us = us;
  });
  return best;
}

// Returns the request for whose plan that of `given` is chosen.
inline Request planned_request(const Request& given) {
  Request request = given;
  if (request.direction == Direction::forward) {
    // Statistics have the same bits with and without a residual, and where possible with and without a mask.
    request.residual = false;
    request.masked = request.masked && request.layout.run() % vec_size != 0;
  }
  return request;
}

inline Plan choose_two_phase(const Request& request, const DeviceLimits& limits) {
  Plan plan = choose_walk(request);
  plan.tiles = std::max(plan.tiles, 1);
  plan.groups = plan.tiles;
  add_shared_bytes(request, plan);
  add_traffic(request, plan);
  add_splits(request, limits, plan);
  return plan;
}

inline Plan choose_plan(const Request& given, const DeviceLimits& limits) {
  const Request request = planned_request(given);
  Plan plan = fastest(request, limits, choose_two_phase(request, limits));
  add_traffic(given, plan);
  return plan;
}

}  // namespace fastbn
