// The one-pass plans for a walk: tiles that fit on chip in a cluster or in a cooperative grid, and there also in part.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/activation.h"
#include "math/types.h"
#include "plan/cost.h"
#include "plan/device.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"
#include "plan/walk.h"

namespace fastbn {

// Upper bound on a thread's slots, far above what fits on chip.
constexpr int64_t max_slots = 1 << 20;

// Lets `blocks` blocks keep a channel tile on chip. Returns whether a block's part fits in `max_bytes`.
inline bool fit_on_chip(const Request& request, Schedule schedule, int blocks, int64_t max_bytes, Plan& plan) {
  const bool reads_residual = request.residual && request.activation != Activation::none && !request.masked;
  const int64_t slots = vectors_per_thread(request.layout, plan, blocks);
  plan.schedule = schedule;
  plan.splits = blocks;
  plan.cluster = schedule == Schedule::resident ? blocks : 1;
  plan.groups = plan.tiles;
  plan.resident_tensors = request.direction == Direction::forward ? 1 : 2 + reads_residual;
  plan.set_slots(std::min(slots, max_slots), element_size(request.dtype));
  add_shared_bytes(request, plan);
  return plan.shared_bytes <= max_bytes;
}

// Returns the shared memory of each of `blocks_per_sm` blocks, in bytes.
inline int64_t shared_bytes_at(const DeviceLimits& limits, int blocks_per_sm) {
  return (limits.shared_bytes_per_block + reserved_shared_bytes) / blocks_per_sm - reserved_shared_bytes;
}

// Returns how many slots per thread fit in `max_bytes` for a plan that fit_on_chip has set.
inline int64_t slots_that_fit(const Request& request, const Plan& plan, int64_t max_bytes) {
  const int64_t slot_bytes =
      int64_t(plan.resident_tensors) * plan.threads * vec_size * int64_t(element_size(request.dtype));
  return (max_bytes - (plan.shared_bytes - plan.slots * slot_bytes)) / slot_bytes;
}

// Makes the cooperative plan with `blocks_per_sm` blocks per SM and as many groups as fit on the chip. Returns whether
// there is one.
inline bool fit_on_grid(const Request& request, const DeviceLimits& limits, int blocks_per_sm, Plan& plan) {
  const int64_t max_bytes = shared_bytes_at(limits, blocks_per_sm);
  const int blocks = limits.sms_of_grid() * blocks_per_sm;
  fit_on_chip(request, Schedule::cooperative, blocks, max_bytes, plan);
  const int64_t slots = slots_that_fit(request, plan, max_bytes);
  if (slots < plan.slots) return false;
  const int64_t items_per_block = slots * (plan.threads / plan.vectors_per_row);
  const int64_t min_blocks = (plan.work_items(request.layout) + items_per_block - 1) / items_per_block;
  const int max_groups = static_cast<int>(std::max<int64_t>(1, blocks / min_blocks));
  const int waves = (plan.tiles + max_groups - 1) / max_groups, groups = (plan.tiles + waves - 1) / waves;
  if (!fit_on_chip(request, Schedule::cooperative, blocks / groups, max_bytes, plan)) return false;
  plan.groups = groups;
  return plan.splits > 1;
}

// Lets one group of all blocks, `blocks_per_sm` per SM, keep as much of a channel tile as fits on the chip and read the
// rest again. Returns whether there is such a plan: the order in which it visits vectors takes rows.
inline bool fit_part_on_grid(const Request& request, const DeviceLimits& limits, int blocks_per_sm, Plan& plan) {
  if (plan.kernel != Kernel::row_tiles) return false;
  const int64_t max_bytes = shared_bytes_at(limits, blocks_per_sm);
  const int blocks = limits.sms_of_grid() * blocks_per_sm;
  if (fit_on_chip(request, Schedule::cooperative, blocks, max_bytes, plan)) return false;
  const int64_t bytes = int64_t(element_size(request.dtype));
  const int64_t vectors = vectors_per_thread(request.layout, plan, blocks);
  const int64_t unit = copy_stages * unroll_of(bytes);  // the slots are reused as a ring, in whole stages
  plan.set_slots(slots_that_fit(request, plan, max_bytes) / unit * unit, bytes);
  if (plan.slots <= 0 || vectors > max_slots) return false;
  plan.groups = 1;
  plan.resident_fraction = double(plan.slots) / double(vectors);
  // Estimate: half of L2 holds what is read again, the other half what passes through.
  const double tile_bytes =
      double(request.layout.count()) * plan.channels_per_tile * double(bytes) * double(plan.resident_tensors);
  plan.reread_fraction = std::max(0.0, 1 - plan.resident_fraction - double(limits.l2_bytes) / 2 / tile_bytes);
  add_shared_bytes(request, plan);
  return plan.splits > 1;
}

// Calls `use(plan)` for the one-pass plans of a walk: all tile widths, clusters and grids that fit on chip, and with
// `parts` also grids that keep a part; the widest tiles and the smallest clusters first. Their traffic is not counted
// yet.
template <class Use>
void for_each_one_pass_plan(const Request& request, const DeviceLimits& limits, const Plan& walk, bool parts, Use use) {
  const int64_t bytes = int64_t(element_size(request.dtype));
  const bool any_width = walk.kernel == Kernel::row_tiles && request.layout.inner == 1 && walk.fold == 1;
  int min_width = walk.vectors_per_row;
  while (any_width && min_width > 1 && min_width / 2 * vec_size * bytes >= min_row_bytes) min_width /= 2;
  const bool backward = request.direction == Direction::backward;
  const int max_per_sm = request.cooperative ? std::min(limits.max_blocks_per_sm,
                                                        blocks_per_sm(bytes, walk.kernel, backward, walk.vectorized))
                                             : 0;
  for (int width = walk.vectors_per_row; width >= min_width; width /= 2) {
    Plan tiled = walk;
    if (any_width) set_tile_width(request.layout, width, tiled);
    for (int cluster = 1; cluster <= limits.max_cluster; cluster *= 2) {
      Plan candidate = tiled;
      if (fit_on_chip(request, Schedule::resident, cluster, limits.shared_bytes_per_block, candidate)) use(candidate);
      if (candidate.slots == 1) break;
    }
    for (int per_sm = 1; per_sm <= max_per_sm; ++per_sm) {
      Plan candidate = tiled;
      if (fit_on_grid(request, limits, per_sm, candidate)) use(candidate);
      candidate = tiled;
      if (parts && fit_part_on_grid(request, limits, per_sm, candidate)) use(candidate);
    }
  }
}

}  // namespace fastbn
