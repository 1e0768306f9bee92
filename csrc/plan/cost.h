// The predicted time of a plan. It serves only to choose among plans.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "math/types.h"
#include "plan/device.h"
#include "plan/plan.h"

namespace fastbn {

// Constants of the prediction, in microseconds, or as factors without a unit. Except where a comment says otherwise
// they are fitted to the times of all plans for 512 cases on an H200 (bench/results/h200-plans.csv): what they choose
// takes 1.03 times as long as the best plan, as a geometric mean over the cases. Pairs are of channel_tiles and
// row_tiles.
struct CostModel {
  // Two-phase plans.
  double two_phase_us = 16;         // per call: its three launches
  double two_phase_traffic = 1.15;  // time per byte, relative to a copy

  // One-pass plans.
  double launch_us = 2;          // per call
  double grid_barrier_us = 2.5;  // per call of a cooperative plan
  double tile_us[2] = {4, 4.5};  // per channel tile: its barriers, and all that is done once per channel
  double cluster_us = 2;         // per channel tile that a cluster shares
  double row_sum_us = 0.003;     // per element of a channel in a row of threads: to bring their sums together
  double merge_us = 0.18;        // per 256 sums of other blocks that are merged
  double sm_us_per_kb[2] = {0.043, 0.052};  // per kilobyte that one SM moves
  double min_memory_factor = 1.1;           // lower bound on that, relative to the SM's part of a copy; estimate
  double lone_block_factor = 1.16;          // time per byte of a block that has its SM to itself (channel_tiles)
  double narrow_row_factor = 1.3;           // time per byte where rows are read in pieces of min_row_bytes

  // One-pass plans that keep a part of a channel tile.
  double part_tile_us = 14;              // per channel tile
  double part_memory_factor = 1.16;      // time per byte from memory, relative to a copy
  double part_narrow_row_factor = 1.35;  // narrow_row_factor of these plans
  double part_l2_factor = 0.9;           // time per byte from L2, relative to a copy
};

// Minimum width of a tile of rows, in bytes: memory hands out pairs of sectors. 256 x 401408 bfloat16 in backward: rows
// of 32 bytes move 1.04 GB where 0.62 would do (H200, by counters).
constexpr int64_t min_row_bytes = 64;

// How the blocks of a one-pass plan fill the device.
struct Occupancy {
  double blocks_per_sm;
  double waves;  // channel tiles, one after the other, that the slowest position on an SM works on
};

inline Occupancy occupancy_of(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  const double sms = limits.sm_count, blocks = double(plan.groups) * plan.splits;
  if (plan.schedule == Schedule::cooperative) {
    return {std::ceil(blocks / limits.sms_of_grid()), std::ceil(double(plan.tiles) / double(plan.groups))};
  }
  const bool backward = request.direction == Direction::backward;
  const int64_t compiled_for =
      blocks_per_sm(int64_t(element_size(request.dtype)), plan.kernel, backward, plan.vectorized);
  const int64_t room =
      (limits.shared_bytes_per_block + reserved_shared_bytes) / (plan.shared_bytes + reserved_shared_bytes);
  const double per_sm = double(std::min(compiled_for, room));
  // Clusters of four and more do not fill the groups of SMs that they must lie in: an H200, of 132 SMs, takes 14
  // clusters of 8 and 7 of 16 at a time.
  const double reached = plan.cluster <= 2 ? sms : std::max(1.0, std::floor(sms * 7 / 8 / plan.cluster)) * plan.cluster;
  return {std::min(per_sm, std::ceil(blocks / reached)), std::ceil(blocks / (reached * per_sm))};
}

// Returns the predicted time of a plan, in microseconds.
inline double predicted_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr CostModel cost;
  const bool rows = plan.kernel == Kernel::row_tiles, cooperative = plan.schedule == Schedule::cooperative;
  const int64_t vector_bytes = vec_size * int64_t(element_size(request.dtype));
  const double tensor_us =
      double(request.layout.numel()) * double(element_size(request.dtype)) / limits.copy_bytes_per_us;
  const double memory_us = (plan.tensor_reads + plan.tensor_writes) * tensor_us;
  if (!is_one_pass(plan)) return cost.two_phase_us + cost.two_phase_traffic * memory_us;

  const auto [per_sm, waves] = occupancy_of(request, limits, plan);
  const double start_us = cost.launch_us + (cooperative ? cost.grid_barrier_us : 0);
  const bool is_narrow = rows && request.layout.inner == 1 && plan.tiles > 1 &&
                         int64_t(plan.groups) * plan.vectors_per_row * vector_bytes <= min_row_bytes;
  if (plan.resident_fraction < 1) {
    const double l2_us = plan.resident_tensors * (1 - plan.resident_fraction - plan.reread_fraction) * tensor_us;
    return start_us + waves * cost.part_tile_us +
           cost.part_memory_factor * (is_narrow ? cost.part_narrow_row_factor : 1) * memory_us +
           cost.part_l2_factor * l2_us;
  }
  const double kilobytes =
      1e-3 * plan.slots * plan.threads * double(vector_bytes) * (plan.resident_tensors + plan.tensor_writes) * per_sm;
  const double memory_us_per_kb = 1e3 * limits.sm_count / limits.copy_bytes_per_us;  // if all SMs have work
  double tile_us = cost.tile_us[rows] + (plan.cluster > 1 ? cost.cluster_us : 0) +
                   kilobytes * std::max(cost.sm_us_per_kb[rows], cost.min_memory_factor * memory_us_per_kb) *
                       (per_sm == 1 && !rows ? cost.lone_block_factor : 1) * (is_narrow ? cost.narrow_row_factor : 1);
  if (rows) {
    tile_us += cost.row_sum_us * double(plan.fold * plan.vectors_per_row * vec_size) / plan.channels_per_tile;
  }
  if (cooperative) tile_us += cost.merge_us * plan.splits * plan.channels_per_tile * per_sm / 256;
  return start_us + waves * tile_us;
}

}  // namespace fastbn
