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
  int most_together = 2;  // blocks of a cooperative plan on one multiprocessor
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
  bool residual = false;    // whether one was added
  bool masked = false;      // the activation's derivative is kept as a bit an element
  bool aligned = true;      // every pointer is a multiple of 16 bytes
  bool fused = true;        // sums and what they are for in one op; channel_stats and grad_sums end with the sums
  bool cooperative = true;  // whether the device grants cooperative launches of the size that its limits promise
};

// Kernels walk runs in octets: eight elements, the unit of the mask and at least one 16-byte access.
constexpr int octet = 8;

// Stages in which copies that were begun together are awaited. Estimate: the first sums begin when a quarter is there.
constexpr int copy_stages = 4;

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
constexpr int blocks_together(int64_t element_size, Kernel kernel, bool backward) {
  if (element_size == 8) return 1;
  return backward && kernel == Kernel::row_blocks && element_size == 4 ? 1 : 2;
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
  int tensors = 0;           // that are kept: input; or grad_out, input, residual (one-pass)
  double kept = 1;           // share of a slice that these are; the rest is read again (one-pass)
  double from_memory = 0;    // share of a slice that is read again and that L2 will not hold
  int64_t shared_bytes = 0;  // the most that one of its launches takes
  int launches = 1;
  double tensor_reads = 0;
  double tensor_writes = 0;

  // Octets of a run of channel_blocks.
  FASTBN_INLINE int64_t octets(const Layout& layout) const { return (layout.inner + octet - 1) / octet; }

  FASTBN_INLINE int slots_a_stage() const { return (slots + copy_stages - 1) / copy_stages; }

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

// Elements of one channel in a block's share.
FASTBN_INLINE int64_t elements_of(const Plan& plan, const Layout& layout, int64_t split) {
  const Share share(plan.places(layout), plan.splits, split);
  if (share.begin == share.end) return 0;
  if (plan.kernel == Kernel::row_blocks) {
    const int64_t end = share.end * plan.fold;
    return ((end < layout.outer ? end : layout.outer) - share.begin * plan.fold) * layout.inner;
  }
  const int64_t octets = plan.octets(layout);
  const auto before = [&](int64_t place) {
    const int64_t in_run = place % octets * octet;
    return place / octets * layout.inner + (in_run < layout.inner ? in_run : layout.inner);
  };
  return before(share.end) - before(share.begin);
}

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
  int64_t scratch = 0;  // three numbers of each of the slice's channels: pivots of the sums, or an Affine
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
  parts.scratch = whole(channels * 3 * 8);
  if (is_one_pass(plan)) {
    parts.exchange = plan.schedule == Schedule::resident ? whole(2 * channels * 24) : 0;
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
  plan.slots = static_cast<int>(std::min<int64_t>(slots, 1 << 20));
  add_shared_bytes(request, plan);
  return plan.shared_bytes <= most_bytes;
}

constexpr int64_t reserved = 1024;  // of a block's shared memory, by the system

// The cooperative plan with `together` blocks a multiprocessor and as many groups as the chip has room for. Returns
// whether there is one.
inline bool keep_on_grid(const Request& request, const DeviceLimits& limits, int together, Plan& plan) {
  const int64_t most_bytes = (limits.shared_bytes_per_block + reserved) / together - reserved;
  const int blocks = limits.sm_count * together;
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
  const int blocks = limits.sm_count * together;
  if (keep_on_chip(request, Schedule::cooperative, blocks, most_bytes, plan)) return false;
  const int64_t bytes = int64_t(element_size(request.dtype));
  const int64_t slot_bytes = int64_t(plan.tensors) * plan.threads * octet * bytes;
  const int64_t in_all = slots_for(request.layout, plan, blocks);
  const int64_t room = (most_bytes - (plan.shared_bytes - plan.slots * slot_bytes)) / slot_bytes;
  plan.slots = static_cast<int>(room / copy_stages * copy_stages);  // whole stages, for they come round
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

// Microseconds that a plan may take: its traffic, at the bandwidth of the multiprocessors that have blocks, its
// launches and its barriers. Only for choosing among plans; all constants are estimates for an H200.
inline double predicted_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr double bytes_a_us = 4.3e6, us_a_launch = 2, us_a_barrier = 3, us_a_wave = 0.5, blocks_of_two_phases = 8;
  constexpr double l2_cost = 0.5;  // of a byte from L2, in bytes from memory
  // A block that has its multiprocessor to itself does not load while it sums and stores.
  constexpr double alone = 0.8;
  const double sms = limits.sm_count, blocks = double(plan.groups) * plan.splits;
  const double from_l2 = (1 - plan.kept - plan.from_memory) * plan.tensors;
  const double traffic = (plan.tensor_reads + plan.tensor_writes + l2_cost * from_l2) * double(request.layout.numel()) *
                         double(element_size(request.dtype));
  const double launches = us_a_launch * plan.launches;
  if (plan.schedule == Schedule::cooperative) {
    const double together = std::ceil(blocks / sms), rounds = std::ceil(double(plan.slices) / double(plan.groups));
    const double busy = blocks / (sms * together) * double(plan.slices) / (rounds * double(plan.groups));
    // While one group waits, another that shares its multiprocessors loads and stores. One more barrier is the grid's.
    const double waits = together > 1 && plan.groups > 1 ? 1 : rounds;
    return traffic / (bytes_a_us * busy) + us_a_barrier * (waits + 1) + launches;
  }
  const bool resident = plan.schedule == Schedule::resident;
  const bool backward = request.direction == Direction::backward;
  const int64_t most = blocks_together(int64_t(element_size(request.dtype)), plan.kernel, backward);
  const int64_t room = (limits.shared_bytes_per_block + reserved) / (plan.shared_bytes + reserved);
  const double together = resident ? double(std::min(most, room)) : blocks_of_two_phases;
  const double waves = std::ceil(blocks / (sms * together));
  // Of the multiprocessors over all waves; a wave that leaves each one some block leaves none idle.
  const double busy = std::min(1.0, blocks / (sms * (waves - 1 + 1 / together) * together));
  const double starts = resident ? us_a_wave * (waves - 1) : 0;
  return traffic / (bytes_a_us * busy * (resident && together < 2 ? alone : 1)) + starts + launches;
}

// The plan, among all slices and clusters or grids that fit on chip and this two-phase one, that is predicted to be the
// fastest; of equals the one with the widest slice and the smallest cluster. Where none fits, a part may be kept.
inline Plan fastest(const Request& request, const DeviceLimits& limits, const Plan& two_phase) {
  const bool sums = request.direction == Direction::forward || request.direction == Direction::backward;
  if (!sums || !request.fused || request.layout.numel() == 0) return two_phase;
  Plan best = two_phase;
  double best_us = predicted_us(request, limits, best);
  const auto consider = [&](Plan tried) {
    add_traffic(request, tried);
    const double us = predicted_us(request, limits, tried);
    if (us < best_us) best = tried, best_us = us;
  };
  // A slice of rows is at most a cache line wide, for more is not more coalesced, and at least a sector, for less would
  // read every byte more than once.
  const int64_t octet_bytes = octet * int64_t(element_size(request.dtype));
  const bool any_width = two_phase.kernel == Kernel::row_blocks && request.layout.inner == 1 && two_phase.fold == 1;
  int least = two_phase.lanes, widest = two_phase.lanes;
  while (any_width && least > 1 && least / 2 * octet_bytes >= 32) least /= 2;
  while (any_width && widest > 1 && widest * octet_bytes > 128) widest /= 2;
  const bool backward = request.direction == Direction::backward;
  const int most_together = !request.cooperative
                                ? 0
                                : std::min(limits.most_together, blocks_together(int64_t(element_size(request.dtype)),
                                                                                 two_phase.kernel, backward));
  const auto for_each_slice = [&](auto use) {
    for (int lanes = widest; lanes >= least && lanes >= 1; lanes /= 2) {
      Plan sliced = two_phase;
      if (any_width) slice_rows(request.layout, lanes, sliced);
      use(sliced);
    }
  };
  for_each_slice([&](const Plan& sliced) {
    for (int cluster = 1; cluster <= limits.max_cluster; cluster *= 2) {
      Plan tried = sliced;
      if (keep_on_chip(request, Schedule::resident, cluster, limits.shared_bytes_per_block, tried)) consider(tried);
      if (tried.slots == 1) break;
    }
    for (int together = 1; together <= most_together; ++together) {
      Plan tried = sliced;
      if (keep_on_grid(request, limits, together, tried)) consider(tried);
    }
  });
  if (is_one_pass(best)) return best;
  for_each_slice([&](const Plan& sliced) {
    for (int together = 1; together <= most_together; ++together) {
      Plan tried = sliced;
      if (keep_part_on_grid(request, limits, together, tried)) consider(tried);
    }
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
  // Estimate: eight blocks of 256 threads an SM hide the latency of a streaming kernel.
  const int64_t wanted_blocks = int64_t(limits.sm_count) * 8;
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
