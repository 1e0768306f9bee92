// The predicted time of a plan. It serves only to choose among plans.
#pragma once

#include <cstdint>

#include "math/types.h"
#include "plan/device.h"
#include "plan/plan.h"

namespace fastbn {

// Constants of the prediction; pairs are of channel_tiles and row_tiles.
struct CostModel {
  // Microseconds per call beside its bytes. Predicted, not measured: the two-phase plans in
  // bench/results/h200-plans.csv, which take several waves, do not overlap their launches and have longer tails, fit 20
  // and 29.
  double two_phase_us[2] = {11, 13};
  double two_phase_traffic = 1.15;  // time per byte, relative to a copy; fitted to those plans (H200)
  // Microseconds per wave of a pass: the prologues and tails of its blocks, in which they move nothing. Those plans fit
  // 3.8 and 8.6 for two passes; with the shorter tail of row_tiles that is an estimate.
  double wave_us[2] = {1.9, 2.8};
};

// Minimum width of a tile of rows, in bytes: memory hands out pairs of sectors. 256 x 401408 bfloat16 in backward: rows
// of 32 bytes move 1.04 GB where 0.62 would do (H200, by counters).
constexpr int64_t min_row_bytes = 64;

// Returns the predicted time of a two-phase plan, in microseconds.
inline double predicted_two_phase_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr CostModel cost;
  const double tensor_us =
      double(request.layout.numel()) * double(element_size(request.dtype)) / limits.copy_bytes_per_us;
  return cost.two_phase_us[plan.kernel == Kernel::row_tiles] +
         cost.two_phase_traffic * (plan.tensor_reads + plan.tensor_writes) * tensor_us;
}

}  // namespace fastbn
