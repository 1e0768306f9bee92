// The choice of a CUDA plan: a pure function of layout, dtype, direction, epilogue and device limits, so that it can be
// tested and explained without a GPU. Traffic is in units of one activation tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
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
  bool residual = false;
  bool aligned = true;  // every pointer is a multiple of 16 bytes
};

// Kernels walk runs in octets: eight elements, the unit of the mask and at least one 16-byte access.
constexpr int octet = 8;

enum class Kernel {
  channel_blocks,  // a block walks the runs of one channel
  row_blocks,      // a block walks rows, a slice of channels wide
};

struct Plan {
  Kernel kernel = Kernel::channel_blocks;
  int threads = 256;
  int lanes = 1;           // octets of a row that one row of threads covers (row_blocks)
  int64_t grid_x = 1;      // channels, or slices of channels
  int64_t splits = 1;      // blocks that share a channel or slice: the grid's second dimension
  bool vectorized = true;  // every octet is whole and 16-byte aligned
  int cluster = 1;
  int64_t shared_bytes = 0;  // the most that one of its launches takes
  int launches = 1;
  double tensor_reads = 0;
  double tensor_writes = 0;
};

inline void add_traffic(const Request& request, Plan& plan) {
  const bool activated = request.activation != Activation::none;
  const bool masked = request.residual && is_piecewise_linear(request.activation);
  const double mask = masked ? 1.0 / (8 * double(element_size(request.dtype))) : 0;
  const double residual = request.residual ? 1 : 0;
  // A backward pass over the elements reads input and grad_out, and what tells the activation's derivative.
  const double backward_pass = 2 + (!activated ? 0 : masked ? mask : residual);
  switch (request.direction) {
    case Direction::forward:
      plan.launches = 3;
      plan.tensor_reads = 2 + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::eval:
      plan.tensor_reads = 1 + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::backward:
      plan.launches = 3;
      plan.tensor_reads = 2 * backward_pass;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
    case Direction::frozen_backward:  // with weight and bias frozen too; their gradients cost the sums
      plan.tensor_reads = !activated ? 1 : masked ? 1 + mask : 2 + residual;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
  }
}

// As the passes lay it out: two float64 totals of each of a thread's channels and a scratch for merging, or the
// coefficients of the block's channels.
inline void add_shared_bytes(const Request& request, Plan& plan) {
  const bool by_rows = plan.kernel == Kernel::row_blocks;
  const int64_t element = request.dtype == DType::float64 ? 8 : 4;
  const int64_t block_channels = by_rows ? plan.lanes * octet : 1;
  const int64_t totals = 2 * (by_rows ? octet : 1) * int64_t(plan.threads) * 8;
  const int64_t merging = int64_t(by_rows ? plan.lanes : 1) * (plan.threads / 32) * 24;  // a Moments a lane and warp
  const int64_t affine = block_channels * 3 * element, both = block_channels * 8 * element;
  const bool forward = request.direction == Direction::forward || request.direction == Direction::eval;
  plan.shared_bytes = request.direction == Direction::eval ? affine
                      : forward                            ? std::max(totals + merging, affine)
                                                           : std::max(totals + std::max(merging, affine), both);
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
  return plan;
}

}  // namespace fastbn
