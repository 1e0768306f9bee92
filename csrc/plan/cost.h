// The predicted time of a plan. It serves only to choose among plans.
#pragma once

#include <cstdint>

#include "math/types.h"
#include "plan/device.h"
#include "plan/plan.h"

namespace fastbn {

// Constants of the prediction, fitted to the times of two-phase plans for 512 cases on an H200
// (bench/results/h200-plans.csv).
struct CostModel {
  double two_phase_us = 16;         // microseconds per call: its three launches
  double two_phase_traffic = 1.15;  // time per byte, relative to a copy
};

// Minimum width of a tile of rows, in bytes: memory hands out pairs of sectors. 256 x 401408 bfloat16 in backward: rows
// of 32 bytes move 1.04 GB where 0.62 would do (H200, by counters).
constexpr int64_t min_row_bytes = 64;

// Returns the predicted time of a two-phase plan, in microseconds.
inline double predicted_two_phase_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr CostModel cost;
  const double tensor_us =
      double(request.layout.numel()) * double(element_size(request.dtype)) / limits.copy_bytes_per_us;
  return cost.two_phase_us + cost.two_phase_traffic * (plan.tensor_reads + plan.tensor_writes) * tensor_us;
}

}  // namespace fastbn
