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
  double bytes_a_us = 4.3e6;  // that a copy moves, read and written; an H200's where a device does not tell
  int grid_sms = 0;           // multiprocessors that a cooperative plan may count on; 0: all
  int most_together = 2;      // blocks of it on one multiprocessor

  int sms_of_grid() const { return grid_sms > 0 && grid_sms < sm_count ? grid_sms : sm_count; }
};

// From NVIDIA's data sheets and programming guide, with 7/8 of the bandwidth, which is what a copy reaches on an H200;
// at run time the device itself is asked.
inline constexpr DeviceLimits known_devices[] = {
    {"a100", 108, 166912, 1, int64_t(40) << 20, 1.36e6},
    {"h100", 132, 232448, 16, int64_t(50) << 20, 2.93e6},
    {"h200", 132, 232448, 16, int64_t(60) << 20, 4.3e6},
    {"b200", 148, 232448, 16, int64_t(126) << 20, 7e6},
};

enum class Direction { forward, eval, backward, frozen_backward };

// What is computed, as far as the choice of a plan depends on it.
struct Request {
  Layout layout;
  DType dtype = DType::float32;
  Direction direction = Direction::forward;
  Activation activation = Activation::none;
  bool residual = false;    // whether one was added
  bool masked = false;      // the activation's derivative is kept as a bit an element
  bool aligned = true;      // every pointer is a multiple of 16 bytes
  bool fused = true;        // sums and what they are for in one op; channel_stats and grad_sums end with the sums
  bool cooperative = true;  // whether the device grants cooperative launches of the size that its limits promise
};

// Kernels walk runs in octets: eight elements, the unit of the mask and at least one 16-byte access.
constexpr int octet = 8;

// Stages in which copies that were begun together are awaited, the first sums when a quarter is there; and the octets
// of a stage that a thread may take side by side, of which stages are whole multiples.
constexpr int copy_stages = 4;
FASTBN_INLINE constexpr int octets_together(int64_t element_size) { return element_size == 2 ? 2 : 1; }

// A block's; the totals of its threads lie so far apart in shared memory whether or not it has as many.
constexpr int most_threads = 256;

enum class Kernel {
  channel_blocks,  // a block walks the runs of one channel
  row_blocks,      // a block walks rows, a slice of channels wide
};

enum class Schedule {
  two_phase,    // a pass for the sums, one that finishes them, and a pass that reads the elements again
  resident,     // one pass: a block, or the blocks of a cluster, keep their slice on chip until its sums are known
  cooperative,  // the same by groups of blocks of one cooperative launch, each for one slice after the other
};

// Blocks of a one-pass kernel that share a multiprocessor; where 128 registers are too few it is one.
constexpr int blocks_together(int64_t element_size, Kernel kernel, bool backward, bool vectorized) {
  if (element_size == 8) return 1;
  return backward && kernel == Kernel::row_blocks && (element_size == 4 || !vectorized) ? 1 : 2;
}

struct Plan {
  Kernel kernel = Kernel::channel_blocks;
  Schedule schedule = Schedule::two_phase;
  int threads = most_threads;
  int lanes = 1;           // octets of a row that one row of threads covers (row_blocks)
  int fold = 1;            // rows of the tensor that are taken as one, for it to be whole octets (row_blocks)
  int width = 0;           // elements of such a row (row_blocks)
  int slice_channels = 1;  // of which a block has the statistics
  int slices = 1;
  int groups = 1;          // of blocks: each has one slice at a time
  int splits = 1;          // blocks of a group, side by side in the grid
  bool vectorized = true;  // every octet is whole and 16-byte aligned
  int cluster = 1;
  int slots = 0;             // octets of each tensor that a thread has places for (one-pass)
  int slots_a_stage = 0;     // that are awaited at once
  int tensors = 0;           // that are kept: input; or grad_out, input, residual (one-pass)
  double kept = 1;           // share of a slice that these are; the rest is read again (one-pass)
  double from_memory = 0;    // share of a slice that is read again and that L2 will not hold
  int64_t shared_bytes = 0;  // the most that one of its launches takes
  int launches = 1;
  double tensor_reads = 0;
  double tensor_writes = 0;

  // Octets of a run of channel_blocks.
  FASTBN_INLINE int64_t octets(const Layout& layout) const { return (layout.inner + octet - 1) / octet; }

  void set_slots(int64_t count, int64_t element_size) {
    const int64_t together = octets_together(element_size), unit = copy_stages * together;
    slots = static_cast<int>(count);
    slots_a_stage = static_cast<int>((count + unit - 1) / unit * together);
  }

  // What the blocks of a slice share: rows, or the octets of all runs of a channel.
  FASTBN_INLINE int64_t places(const Layout& layout) const {
    return kernel == Kernel::row_blocks ? (layout.outer + fold - 1) / fold : layout.outer * octets(layout);
  }
};

FASTBN_INLINE bool is_one_pass(const Plan& plan) { return plan.schedule != Schedule::two_phase; }

// The part [begin, end) of a block; it may have none.
struct Share {
  int64_t begin, end;

  FASTBN_INLINE Share(int64_t places, int64_t splits, int64_t split) {
    const int64_t each = (places + splits - 1) / splits;
    begin = split * each < places ? split * each : places;
    end = begin + each < places ? begin + each : places;
  }
};

inline void add_traffic(const Request& request, Plan& plan) {
  const bool activated = request.activation != Activation::none;
  const bool masked = request.masked;
  const double mask = masked ? 1.0 / (8 * double(element_size(request.dtype))) : 0;
  const double residual = request.residual ? 1 : 0;
  const bool once = is_one_pass(plan);
  // A backward pass over the elements reads input and grad_out, and what tells the activation's derivative.
  const double backward_pass = 2 + (!activated ? 0 : masked ? mask : residual);
  switch (request.direction) {
    case Direction::forward:
      plan.launches = once ? 1 : 3;
      plan.tensor_reads = (once ? 1 + plan.from_memory : 2) + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::eval:
      plan.tensor_reads = 1 + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::backward:
      plan.launches = once ? 1 : 3;
      // Bits are not worth a place on chip: they are read twice.
      plan.tensor_reads = once ? backward_pass + mask + plan.tensors * plan.from_memory : 2 * backward_pass;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
    case Direction::frozen_backward:  // with weight and bias frozen too; their gradients take x and a second launch
      plan.tensor_reads = !activated ? 1 : masked ? 1 + mask : 2 + residual;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
  }
}

// Bytes of a block's shared memory, one part behind the other. Totals are two float64 sums of each of a thread's
// channels.
struct SharedMemory {
  int64_t totals = 0;
  int64_t votes = 0;    // a word a warp
  int64_t scratch = 0;  // four numbers of each of the slice's channels: what sums need of it, or its moments
  // Of one-pass plans:
  int64_t exchange = 0;      // the block's sums of each of its channels, for its cluster
  int64_t coefficients = 0;  // made from all sums while others may still read `exchange`
  int64_t slab = 0;          // the octets that are kept

  FASTBN_INLINE int64_t bytes() const { return totals + votes + scratch + exchange + coefficients + slab; }
};

// element: the bytes of the type that elements are computed in; octet_bytes: of eight elements as they are stored.
FASTBN_INLINE SharedMemory shared_memory_of(const Plan& plan, bool backward, int64_t element, int64_t octet_bytes) {
  const int64_t channels = plan.slice_channels, affine = channels * 3 * element, both = channels * 6 * element;
  const auto whole = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  SharedMemory parts;
  parts.totals = 2 * (plan.kernel == Kernel::row_blocks ? octet : 1) * int64_t(most_threads) * 8;
  parts.votes = most_threads / 32 * 4;
  parts.scratch = channels * 4 * 8;
  if (is_one_pass(plan)) {
    parts.exchange = plan.schedule == Schedule::resident ? 2 * channels * 16 : 0;
    parts.coefficients = whole(backward ? both : affine);
    parts.slab = int64_t(plan.slots) * plan.tensors * plan.threads * octet_bytes;
  }
  return parts;
}

inline void add_shared_bytes(const Request& request, Plan& plan) {
  const int64_t element = request.dtype == DType::float64 ? 8 : 4;
  const bool forward = request.direction == Direction::forward || request.direction == Direction::eval;
  const auto parts = shared_memory_of(plan, !forward, element, octet * int64_t(element_size(request.dtype)));
  const int64_t last_pass = plan.slice_channels * (forward ? 3 : 6) * element;
  plan.shared_bytes = request.direction == Direction::eval ? last_pass : std::max(parts.bytes(), last_pass);
}

// Lets slices be `lanes` octets wide.
inline void slice_rows(const Layout& layout, int64_t lanes, Plan& plan) {
  plan.kernel = Kernel::row_blocks;
  plan.lanes = static_cast<int>(lanes);
  plan.width = static_cast<int>(plan.fold * layout.channels * layout.inner);
  const int64_t channels = lanes * octet / layout.inner;  // of the slice, or where rows are folded, `fold` times all
  plan.slice_channels = static_cast<int>(plan.fold > 1 ? layout.channels : channels);
  plan.slices = plan.fold > 1 ? 1 : static_cast<int>((layout.channels + channels - 1) / channels);
}

// How blocks walk the tensor, but for the width of the slices of rows that are whole octets.
inline Plan choose_walk(const Request& request) {
  const Layout& layout = request.layout;
  const int64_t bytes = int64_t(element_size(request.dtype)), width = layout.channels * layout.inner;
  // Elements until the same happens again with an octet's boundary.
  const auto rounds = [](int64_t elements) {
    int64_t count = 1;
    while (count * elements % octet != 0) ++count;
    return count;
  };
  Plan plan;
  plan.slices = static_cast<int>(layout.channels);
  plan.vectorized = request.aligned && layout.run() % octet == 0;
  // Estimate: runs of a cache line and more need no neighbours.
  const bool runs_do = layout.run() % octet == 0 && (layout.channels_are_innermost() || layout.inner * bytes >= 128);
  // The mask has whole bytes a run, and the octets of rows that span several are not the same.
  const bool rows_may_span = request.aligned && (!request.masked || layout.run() % octet == 0);
  if (!runs_do && rows_may_span && layout.numel() > 0) {
    const int64_t channels = rounds(layout.inner);
    int64_t lanes = channels * layout.inner / octet;
    if (!layout.channels_are_innermost() && layout.channels % channels == 0 && lanes <= most_threads) {
      const int64_t narrowest = lanes;
      while (lanes * octet * bytes < 128 && lanes * octet < width && lanes + narrowest <= most_threads) {
        lanes += narrowest;
      }
      slice_rows(layout, lanes, plan);
      plan.vectorized = true;
      return plan;
    }
    const int64_t fold = rounds(width);
    if (fold * width / octet <= most_threads) {
      plan.fold = static_cast<int>(fold);
      slice_rows(layout, fold * width / octet, plan);
      plan.vectorized = true;
      return plan;
    }
  }
  if (layout.channels_are_innermost()) {
    int64_t lanes = 1;
    // Estimate: 32 octets are 512 bytes of bf16 a row, whole sectors for any dtype.
    while (lanes < 32 && lanes * octet < width) lanes *= 2;
    slice_rows(layout, lanes, plan);
  }
  return plan;
}

// Octets of each tensor that each thread keeps where so many blocks share a slice.
inline int64_t slots_for(const Layout& layout, const Plan& plan, int64_t blocks) {
  const int64_t share = (plan.places(layout) + blocks - 1) / blocks, together = plan.threads / plan.lanes;
  return (share + together - 1) / together;
}

// Lets `blocks` blocks keep a slice on chip. Returns whether a block's share fits into so many bytes.
inline bool keep_on_chip(const Request& request, Schedule schedule, int blocks, int64_t most_bytes, Plan& plan) {
  const bool reads_residual = request.residual && request.activation != Activation::none && !request.masked;
  const int64_t slots = slots_for(request.layout, plan, blocks);
  plan.schedule = schedule;
  plan.splits = blocks;
  plan.cluster = schedule == Schedule::resident ? blocks : 1;
  plan.groups = plan.slices;
  plan.tensors = request.direction == Direction::forward ? 1 : 2 + reads_residual;
  plan.set_slots(std::min<int64_t>(slots, 1 << 20), element_size(request.dtype));
  add_shared_bytes(request, plan);
  return plan.shared_bytes <= most_bytes;
}

constexpr int64_t reserved = 1024;  // of a block's shared memory, by the system

// The cooperative plan with `together` blocks a multiprocessor and as many groups as the chip has room for. Returns
// whether there is one.
inline bool keep_on_grid(const Request& request, const DeviceLimits& limits, int together, Plan& plan) {
  const int64_t most_bytes = (limits.shared_bytes_per_block + reserved) / together - reserved;
  const int blocks = limits.sms_of_grid() * together;
  keep_on_chip(request, Schedule::cooperative, blocks, most_bytes, plan);
  const int64_t slot_bytes = int64_t(plan.tensors) * plan.threads * octet * int64_t(element_size(request.dtype));
  const int64_t slots = (most_bytes - (plan.shared_bytes - plan.slots * slot_bytes)) / slot_bytes;
  if (slots < plan.slots) return false;
  const int64_t a_block = slots * (plan.threads / plan.lanes);  // places
  const int64_t fewest = (plan.places(request.layout) + a_block - 1) / a_block;
  const int at_once = static_cast<int>(std::max<int64_t>(1, blocks / fewest));
  const int rounds = (plan.slices + at_once - 1) / at_once, groups = (plan.slices + rounds - 1) / rounds;
  if (!keep_on_chip(request, Schedule::cooperative, blocks / groups, most_bytes, plan)) return false;
  plan.groups = groups;
  return plan.splits > 1;
}

// Lets one group of all blocks, `together` on a multiprocessor, keep as much of a slice as the chip holds and read the
// rest again. Returns whether that is worth while; only rows can be visited in the order that it takes.
inline bool keep_part_on_grid(const Request& request, const DeviceLimits& limits, int together, Plan& plan) {
  if (plan.kernel != Kernel::row_blocks) return false;
  const int64_t most_bytes = (limits.shared_bytes_per_block + reserved) / together - reserved;
  const int blocks = limits.sms_of_grid() * together;
  if (keep_on_chip(request, Schedule::cooperative, blocks, most_bytes, plan)) return false;
  const int64_t bytes = int64_t(element_size(request.dtype));
  const int64_t slot_bytes = int64_t(plan.tensors) * plan.threads * octet * bytes;
  const int64_t in_all = slots_for(request.layout, plan, blocks);
  const int64_t room = (most_bytes - (plan.shared_bytes - plan.slots * slot_bytes)) / slot_bytes;
  const int64_t unit = copy_stages * octets_together(bytes);
  plan.set_slots(room / unit * unit, bytes);  // whole stages, for they come round
  if (plan.slots <= 0 || in_all > (1 << 20)) return false;
  plan.groups = 1;
  plan.kept = double(plan.slots) / double(in_all);
  // Estimate: half of L2 holds what is read again, the other half what passes by.
  const double slice_bytes =
      double(request.layout.count()) * plan.slice_channels * double(bytes) * double(plan.tensors);
  plan.from_memory = std::max(0.0, 1 - plan.kept - double(limits.l2_bytes) / 2 / slice_bytes);
  add_shared_bytes(request, plan);
  return plan.splits > 1;
}

// Of a slice of rows: memory hands out pairs of sectors. 256 x 401408 bfloat16 in backward: slices of 32 bytes
// move 1.04 GB where 0.62 would do (H200, by counters).
constexpr int64_t narrowest_bytes = 64;

// Blocks of a one-pass plan that share a multiprocessor, and how often one makes room for the next.
struct Occupancy {
  double together, rounds;
};

inline Occupancy occupancy_of(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  const double sms = limits.sm_count, blocks = double(plan.groups) * plan.splits;
  if (plan.schedule == Schedule::cooperative) {
    return {std::ceil(blocks / limits.sms_of_grid()), std::ceil(double(plan.slices) / double(plan.groups))};
  }
  const bool backward = request.direction == Direction::backward;
  const int64_t most = blocks_together(int64_t(element_size(request.dtype)), plan.kernel, backward, plan.vectorized);
  const int64_t room = (limits.shared_bytes_per_block + reserved) / (plan.shared_bytes + reserved);
  const double together = double(std::min(most, room));
  // Clusters of four and more do not fill the groups of multiprocessors that they must lie in: an H200 takes 14 of 16
  // blocks at a time, and 28 of 8, where it has 132 multiprocessors.
  const double reached = plan.cluster <= 2 ? sms : std::max(1.0, std::floor(sms * 7 / 8 / plan.cluster)) * plan.cluster;
  return {std::min(together, std::ceil(blocks / reached)), std::ceil(blocks / (reached * together))};
}

// Microseconds that a plan may take. Only for choosing among plans. The constants are fitted to the times of all plans
// for 512 cases on an H200 (bench/results/h200-plans.csv): what they choose takes 1.03 times as long as the best plan,
// as a geometric mean over the cases.
inline double predicted_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr double us_of_two_phases = 16, two_phases = 1.15;
  constexpr double us_a_launch = 2, us_a_grid_barrier = 2.5;
  // Of a slice: its barriers and all that is done once a channel; of a block of a cluster; of bringing together the
  // sums of a channel's elements in a row; and of merging 256 sums of other blocks.
  constexpr double us_a_slice[] = {4, 4.5}, us_a_cluster = 2, us_an_element = 0.003, us_of_merging = 0.18;
  // That a multiprocessor moves, by kernel; estimate: where memory is slower, not much faster than that.
  constexpr double us_a_kilobyte[] = {0.043, 0.052}, at_least = 1.1;
  // What a block that has its multiprocessor to itself, and rows that are read by pieces of 64 bytes, take longer.
  constexpr double alone = 1.16, narrow = 1.3;
  // Of slices that are kept in part.
  constexpr double us_a_part = 14, part = 1.16, narrow_part = 1.35, l2_cost = 0.9;

  const bool rows = plan.kernel == Kernel::row_blocks, cooperative = plan.schedule == Schedule::cooperative;
  const int64_t octet_bytes = octet * int64_t(element_size(request.dtype));
  const double tensor_us = double(request.layout.numel()) * double(element_size(request.dtype)) / limits.bytes_a_us;
  const double memory_us = (plan.tensor_reads + plan.tensor_writes) * tensor_us;
  if (!is_one_pass(plan)) return us_of_two_phases + two_phases * memory_us;

  const auto [together, rounds] = occupancy_of(request, limits, plan);
  const double start = us_a_launch + (cooperative ? us_a_grid_barrier : 0);
  const bool is_narrow = rows && request.layout.inner == 1 && plan.slices > 1 &&
                         int64_t(plan.groups) * plan.lanes * octet_bytes <= narrowest_bytes;
  if (plan.kept < 1) {
    const double l2_us = plan.tensors * (1 - plan.kept - plan.from_memory) * tensor_us;
    return start + rounds * us_a_part + part * (is_narrow ? narrow_part : 1) * memory_us + l2_cost * l2_us;
  }
  const double kilobytes =
      1e-3 * plan.slots * plan.threads * double(octet_bytes) * (plan.tensors + plan.tensor_writes) * together;
  const double us_of_memory = 1e3 * limits.sm_count / limits.bytes_a_us;  // a kilobyte's, if all have work
  double slice = us_a_slice[rows] + (plan.cluster > 1 ? us_a_cluster : 0) +
                 kilobytes * std::max(us_a_kilobyte[rows], at_least * us_of_memory) *
                     (together == 1 && !rows ? alone : 1) * (is_narrow ? narrow : 1);
  if (rows) slice += us_an_element * double(plan.fold * plan.lanes * octet) / plan.slice_channels;
  if (cooperative) slice += us_of_merging * plan.splits * plan.slice_channels * together / 256;
  return start + rounds * slice;
}

// Calls use(plan) for the one-pass plans of a walk: all slices, clusters and grids that fit on chip, and with `parts`
// also grids that keep a part; the widest slices and the smallest clusters first. Their traffic is not counted yet.
template <class Use>
void for_each_one_pass_plan(const Request& request, const DeviceLimits& limits, const Plan& walk, bool parts, Use use) {
  const int64_t bytes = int64_t(element_size(request.dtype));
  const bool any_width = walk.kernel == Kernel::row_blocks && request.layout.inner == 1 && walk.fold == 1;
  int least = walk.lanes;
  while (any_width && least > 1 && least / 2 * octet * bytes >= narrowest_bytes) least /= 2;
  const bool backward = request.direction == Direction::backward;
  const int most_together =
      request.cooperative
          ? std::min(limits.most_together, blocks_together(bytes, walk.kernel, backward, walk.vectorized))
          : 0;
  for (int lanes = walk.lanes; lanes >= least; lanes /= 2) {
    Plan sliced = walk;
    if (any_width) slice_rows(request.layout, lanes, sliced);
    for (int cluster = 1; cluster <= limits.max_cluster; cluster *= 2) {
      Plan tried = sliced;
      if (keep_on_chip(request, Schedule::resident, cluster, limits.shared_bytes_per_block, tried)) use(tried);
      if (tried.slots == 1) break;
    }
    for (int together = 1; together <= most_together; ++together) {
      Plan tried = sliced;
      if (keep_on_grid(request, limits, together, tried)) use(tried);
      tried = sliced;
      if (parts && keep_part_on_grid(request, limits, together, tried)) use(tried);
    }
  }
}

// The plan, among the one-pass plans and this two-phase one, that is predicted to be the fastest; of equals the first.
inline Plan fastest(const Request& request, const DeviceLimits& limits, const Plan& two_phase) {
  const bool sums = request.direction == Direction::forward || request.direction == Direction::backward;
  if (!sums || !request.fused || request.layout.numel() == 0) return two_phase;
  // Keeping a part and reading the rest again takes 0.93 of the time of two phases in backward of half types (geometric
  // mean of 38 cases on an H200), but 1.4 times that of float32, 1.2 with a residual, and 1.1 in forward with one.
  const bool parts_pay = request.direction == Direction::backward && element_size(request.dtype) == 2 &&
                         !request.residual && !request.masked;
  Plan best = two_phase;
  double best_us = predicted_us(request, limits, best);
  for_each_one_pass_plan(request, limits, two_phase, parts_pay, [&](Plan tried) {
    add_traffic(request, tried);
    const double us = predicted_us(request, limits, tried);
    if (us < best_us) best = tried, best_us = us;
  });
  return best;
}

inline Plan choose_plan(const Request& given, const DeviceLimits& limits) {
  Request request = given;
  if (request.direction == Direction::forward) {
    // Statistics are the same bits with and without a residual, and with and without a mask wherever they can be.
    request.residual = false;
    request.masked = request.masked && request.layout.run() % octet != 0;
  }
  Plan plan = choose_walk(request);
  plan.slices = std::max(plan.slices, 1);
  plan.groups = plan.slices;
  // Of two-phase plans on a multiprocessor: as many as its registers hold, or two waves of that.
  const int64_t wanted_blocks = int64_t(limits.sm_count) * (plan.kernel == Kernel::row_blocks ? 4 : 8);
  // Estimate: a split under four steps is not worth its block.
  const int64_t most_splits = std::clamp<int64_t>(slots_for(request.layout, plan, 1) / 4, 1, 1024);
  plan.splits = static_cast<int>(std::clamp<int64_t>(wanted_blocks / plan.slices, 1, most_splits));
  add_traffic(request, plan);
  add_shared_bytes(request, plan);
  plan = fastest(request, limits, plan);
  add_traffic(given, plan);
  return plan;
}

}  // namespace fastbn
