// The choice of a CUDA plan: a pure function of layout, dtype, direction, epilogue and device limits, so that it can be
// tested and explained without a GPU. Traffic is in units of one activation tensor. Also where a block keeps what in
// shared memory, which planner and kernels have to agree on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
#include "math/macros.h"
#include "math/types.h"

namespace fastbn {

struct DeviceLimits {
  const char* name;
  int sm_count;
  int64_t shared_bytes_per_block;
  int max_cluster;
  int64_t l2_bytes;
};

// From NVIDIA's data sheets and programming guide; at run time the device itself is asked.
inline constexpr DeviceLimits known_devices[] = {
    {"a100", 108, 166912, 1, int64_t(40) << 20},
    {"h100", 132, 232448, 16, int64_t(50) << 20},
    {"h200", 132, 232448, 16, int64_t(60) << 20},
    {"b200", 148, 232448, 16, int64_t(126) << 20},
};

enum class Direction { forward, eval, backward, frozen_backward };

// What is computed, as far as the choice of a plan depends on it.
struct Request {
  Layout layout;
  DType dtype = DType::float32;
  Direction direction = Direction::forward;
  Activation activation = Activation::none;
  bool residual = false;  // whether one was added
  bool masked = false;    // the activation's derivative is kept as a bit an element
  bool aligned = true;    // every pointer is a multiple of 16 bytes
  bool fused = true;      // sums and what they are for in one op; channel_stats and grad_sums end with the sums
};

// Kernels walk runs in octets: eight elements, the unit of the mask and at least one 16-byte access.
constexpr int octet = 8;

// A block's; the totals of its threads lie so far apart in shared memory whether or not it has as many.
constexpr int most_threads = 256;

enum class Kernel {
  channel_blocks,  // a block walks the runs of one channel
  row_blocks,      // a block walks rows, a slice of channels wide
};

enum class Schedule {
  two_phase,  // a pass for the sums, one that finishes them, and a pass that reads the elements again
  resident,   // one pass: a block, or the blocks of a cluster, keep their slice on chip until its sums are known
};

struct Plan {
  Kernel kernel = Kernel::channel_blocks;
  Schedule schedule = Schedule::two_phase;
  int threads = most_threads;
  int lanes = 1;           // octets of a row that one row of threads covers (row_blocks)
  int64_t grid_x = 1;      // channels, or slices of channels
  int64_t splits = 1;      // blocks that share a channel or slice: the grid's second dimension, or a cluster
  bool vectorized = true;  // every octet is whole and 16-byte aligned
  int cluster = 1;
  int slots = 0;             // octets of each tensor that a thread keeps (resident)
  int tensors = 0;           // that are kept: input; or grad_out, input, residual (resident)
  int64_t shared_bytes = 0;  // the most that one of its launches takes
  int launches = 1;
  double tensor_reads = 0;
  double tensor_writes = 0;
};

inline void add_traffic(const Request& request, Plan& plan) {
  const bool activated = request.activation != Activation::none;
  const bool masked = request.masked;
  const double mask = masked ? 1.0 / (8 * double(element_size(request.dtype))) : 0;
  const double residual = request.residual ? 1 : 0;
  const bool once = plan.schedule == Schedule::resident;
  // A backward pass over the elements reads input and grad_out, and what tells the activation's derivative.
  const double backward_pass = 2 + (!activated ? 0 : masked ? mask : residual);
  switch (request.direction) {
    case Direction::forward:
      plan.launches = once ? 1 : 3;
      plan.tensor_reads = (once ? 1 : 2) + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::eval:
      plan.tensor_reads = 1 + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::backward:
      plan.launches = once ? 1 : 3;
      // Bits are not worth a place on chip: they are read twice.
      plan.tensor_reads = once ? backward_pass + mask : 2 * backward_pass;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
    case Direction::frozen_backward:  // with weight and bias frozen too; their gradients cost the sums
      plan.tensor_reads = !activated ? 1 : masked ? 1 + mask : 2 + residual;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
  }
}

// Bytes of a block's shared memory, one part behind the other. Totals are two float64 sums of each of a thread's
// channels; the scratch merges them, and holds coefficients while it does not.
struct SharedMemory {
  int64_t totals = 0, scratch = 0;
  int64_t exchange = 0;      // resident: the block's sums of each of its channels, for its cluster
  int64_t coefficients = 0;  // resident: made from all sums while others may still read `exchange`
  int64_t slab = 0;          // resident: the octets that are kept

  FASTBN_INLINE int64_t bytes() const { return totals + scratch + exchange + coefficients + slab; }
};

// element: the bytes of the type that elements are computed in; octet_bytes: of eight elements as they are stored.
FASTBN_INLINE SharedMemory shared_memory_of(const Plan& plan, bool backward, int64_t element, int64_t octet_bytes) {
  const bool by_rows = plan.kernel == Kernel::row_blocks;
  const int64_t lanes = by_rows ? plan.lanes : 1;
  const int64_t block_channels = by_rows ? lanes * octet : 1;
  const int64_t merging = lanes * (plan.threads / 32) * 24;  // a Moments a lane and warp
  const int64_t affine = block_channels * 3 * element, both = block_channels * 8 * element;
  const auto whole = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  SharedMemory parts;
  parts.totals = 2 * (by_rows ? octet : 1) * int64_t(most_threads) * 8;
  parts.scratch = whole(merging > affine ? merging : affine);
  if (plan.schedule == Schedule::resident) {
    parts.exchange = whole(block_channels * 24);
    parts.coefficients = whole(backward ? both : affine);
    parts.slab = int64_t(plan.slots) * plan.tensors * plan.threads * octet_bytes;
  }
  return parts;
}

inline void add_shared_bytes(const Request& request, Plan& plan) {
  const int64_t element = request.dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = plan.kernel == Kernel::row_blocks ? plan.lanes * octet : 1;
  const bool forward = request.direction == Direction::forward || request.direction == Direction::eval;
  const auto parts = shared_memory_of(plan, !forward, element, octet * int64_t(element_size(request.dtype)));
  const int64_t last_pass = lanes * (forward ? 3 : 8) * element;
  plan.shared_bytes = request.direction == Direction::eval ? last_pass : std::max(parts.bytes(), last_pass);
}

// Makes the plan resident with the given slice and cluster if a block's share fits. Returns whether it does.
inline bool keep_on_chip(const Request& request, const DeviceLimits& limits, int lanes, int cluster, Plan& plan) {
  const Layout& layout = request.layout;
  const bool by_rows = plan.kernel == Kernel::row_blocks;
  const int64_t octets_per_run = layout.mask_bytes_per_run();
  const int64_t places = by_rows ? layout.outer : layout.outer * octets_per_run;
  const int64_t share = (places + cluster - 1) / cluster, together = plan.threads / (by_rows ? lanes : 1);
  const int64_t slots = (share + together - 1) / together;
  const bool reads_residual = request.residual && request.activation != Activation::none && !request.masked;
  Plan tried = plan;
  tried.schedule = Schedule::resident;
  tried.lanes = by_rows ? lanes : 1;
  tried.grid_x = by_rows ? (octets_per_run + lanes - 1) / lanes : layout.channels;
  tried.splits = tried.cluster = cluster;
  tried.tensors = request.direction == Direction::forward ? 1 : 2 + reads_residual;
  tried.slots = static_cast<int>(std::min<int64_t>(slots, 1 << 20));
  add_shared_bytes(request, tried);
  if (tried.shared_bytes > limits.shared_bytes_per_block) return false;
  plan = tried;
  return true;
}

// Microseconds that a plan may take: its traffic, at the bandwidth of the multiprocessors that have blocks, and its
// launches. Only for choosing among plans; all constants are estimates for an H200.
inline double predicted_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr double bytes_a_us = 4.3e6, us_a_launch = 2, blocks_of_two_phases = 8;
  // A block that has its multiprocessor to itself does not load while it sums and stores.
  constexpr double alone = 0.8;
  const bool resident = plan.schedule == Schedule::resident;
  const double together =
      resident ? std::floor(double(limits.shared_bytes_per_block) / double(plan.shared_bytes)) : blocks_of_two_phases;
  const double blocks = double(plan.grid_x * plan.splits), waves = std::ceil(blocks / (limits.sm_count * together));
  // Of the multiprocessors over all waves; a wave that leaves each one some block leaves none idle.
  const double busy = std::min(1.0, blocks / (limits.sm_count * (waves - 1 + 1 / together) * together));
  const double bytes = double(request.layout.numel()) * double(element_size(request.dtype));
  const double rate = bytes_a_us * busy * (resident && together < 2 ? alone : 1);
  return (plan.tensor_reads + plan.tensor_writes) * bytes / rate + us_a_launch * plan.launches;
}

// The plan, among all slices and clusters that fit on chip and this two-phase one, that is predicted to be the fastest;
// of equals the one with the widest slice and the smallest cluster.
inline Plan fastest(const Request& request, const DeviceLimits& limits, const Plan& two_phase) {
  const bool sums = request.direction == Direction::forward || request.direction == Direction::backward;
  if (!sums || !request.fused || request.layout.numel() == 0) return two_phase;
  const bool by_rows = two_phase.kernel == Kernel::row_blocks;
  // A slice of rows is at most a cache line wide, for more is not more coalesced, and at least a sector, for less would
  // read every byte more than once.
  const int64_t octet_bytes = octet * int64_t(element_size(request.dtype));
  int least = 1, widest = 1;
  while (by_rows && least < two_phase.lanes && least * octet_bytes < 32) least *= 2;
  while (by_rows && widest < two_phase.lanes && widest * octet_bytes < 128) widest *= 2;
  Plan best = two_phase;
  double best_us = predicted_us(request, limits, best);
  for (int lanes = widest; lanes >= least; lanes /= 2) {
    for (int cluster = 1; cluster <= limits.max_cluster; cluster *= 2) {
      Plan tried = two_phase;
      if (!keep_on_chip(request, limits, lanes, cluster, tried)) continue;
      add_traffic(request, tried);
      const double us = predicted_us(request, limits, tried);
      if (us < best_us) best = tried, best_us = us;
      if (tried.slots == 1) break;
    }
  }
  return best;
}

inline Plan choose_plan(const Request& request, const DeviceLimits& limits) {
  const Layout& layout = request.layout;
  Plan plan;
  plan.vectorized = request.aligned && layout.run() % octet == 0;
  const int64_t octets_per_run = (layout.run() + octet - 1) / octet;
  // Estimate: eight blocks of 256 threads an SM hide the latency of a streaming kernel.
  const int64_t wanted_blocks = int64_t(limits.sm_count) * 8;
  int64_t steps;  // of a block that has a channel or slice to itself
  if (layout.channels_are_innermost()) {
    plan.kernel = Kernel::row_blocks;
    // Estimate: 32 octets are 512 bytes of bf16 a row, whole sectors for any dtype.
    while (plan.lanes < 32 && plan.lanes < octets_per_run) plan.lanes *= 2;
    plan.grid_x = (octets_per_run + plan.lanes - 1) / plan.lanes;
    steps = (layout.outer * plan.lanes + plan.threads - 1) / plan.threads;
  } else {
    plan.kernel = Kernel::channel_blocks;
    plan.grid_x = layout.channels;
    steps = (layout.outer * octets_per_run + plan.threads - 1) / plan.threads;
  }
  plan.grid_x = std::max<int64_t>(plan.grid_x, 1);
  // Estimate: a split under four steps is not worth its block.
  const int64_t most_splits = std::max<int64_t>(1, std::min<int64_t>(steps / 4, 1024));
  plan.splits = std::clamp<int64_t>(wanted_blocks / plan.grid_x, 1, most_splits);
  add_traffic(request, plan);
  add_shared_bytes(request, plan);
  return fastest(request, limits, plan);
}

}  // namespace fastbn
