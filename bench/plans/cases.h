// The ops that bench/plans.cu measures and checks, those that tell most first, so that a time limit cuts the others.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/planner.h"

namespace fastbn::bench {

// What follows the normalisation. Measurements have the first three; with add_silu backward reads the residual again.
enum Epilogue { none, relu, add_relu, silu, add_silu };
constexpr const char* epilogue_names[] = {"none", "relu", "add_relu", "silu", "add_silu"};

struct Op {
  Layout layout;
  DType dtype;
  Direction direction;
  Epilogue epilogue;

  bool backward() const { return direction == Direction::backward; }
  bool adds() const { return epilogue == add_relu || epilogue == add_silu; }
  // A mask stands for the residual in the backward of a relu, where runs fill its bytes.
  bool masked() const { return epilogue == add_relu && layout.run() % vec_size == 0; }

  Activation activation() const {
    switch (epilogue) {
      case none: return Activation::none;
      case relu:
      case add_relu: return Activation::relu;
      case silu:
      case add_silu: return Activation::silu;
    }
    __builtin_unreachable();
  }

  Request request() const {
    Request request{layout, dtype, direction};
    request.activation = activation();
    request.masked = masked();
    request.residual = adds() && (!backward() || !masked());
    return request;
  }

  std::string shape() const {
    return std::to_string(layout.outer) + "," + std::to_string(layout.channels) + "," + std::to_string(layout.inner);
  }

  // Returns the op as the first columns of the CSV.
  std::string name() const {
    return shape() + "," + dtype_names[static_cast<int>(dtype)] + "," + (backward() ? "backward" : "forward") + "," +
           epilogue_names[epilogue];
  }
};

using Layouts = std::vector<Layout>;

// Appends a shape as a contiguous tensor, and as a channels_last one.
inline void add_both(Layouts& layouts, int64_t n, int64_t channels, int64_t space) {
  layouts.push_back({n, channels, space});
  if (space > 1) layouts.push_back({n * space, channels, 1});
}

// Returns the inputs of ResNet-50's BatchNorms: first one of each kind and size.
inline Layouts resnet50(int n) {
  const int shapes[][2] = {{256, 28}, {256, 14}, {512, 7},  {64, 56},  {512, 28}, {1024, 14},
                           {2048, 7}, {128, 28}, {256, 56}, {512, 14}, {128, 56}, {64, 112}};
  Layouts layouts;
  for (auto [channels, size] : shapes) add_both(layouts, n, channels, size * size);
  return layouts;
}

// Returns inputs of MobileNetV3 and of other networks, some of few channels, and some so small that the launch takes
// most of the time.
inline Layouts other_layouts() {
  const int64_t shapes[][3] = {{128, 16, 112 * 112}, {128, 72, 56 * 56}, {128, 40, 28 * 28}, {128, 184, 14 * 14},
                               {128, 480, 14 * 14},  {128, 672, 7 * 7},  {128, 960, 7 * 7},  {64, 256, 1024},
                               {4096, 512, 1},       {1000000, 64, 1},   {2, 64, 49},        {8, 16, 196},
                               {32, 128, 1},         {3, 5, 16},         {29, 13, 1},        {70, 24, 49},
                               {128, 3, 224 * 224},  {64, 1, 512 * 512}, {16, 8, 512 * 512}, {16, 32, 16 * 56 * 56},
                               {16, 64, 512 * 512}};
  Layouts layouts;
  for (auto [n, channels, space] : shapes) add_both(layouts, n, channels, space);
  return layouts;
}

inline std::vector<Op> measured_ops() {
  std::vector<Op> ops;
  const auto add = [&](const Layouts& layouts, DType dtype, std::vector<Epilogue> epilogues) {
    for (Epilogue epilogue : epilogues)
      for (const Layout& layout : layouts)
        for (Direction direction : {Direction::forward, Direction::backward})
          ops.push_back({layout, dtype, direction, epilogue});
  };
  const Layouts others = other_layouts();
  add(resnet50(128), DType::bfloat16, {none});
  add(resnet50(128), DType::float32, {none});
  add(resnet50(128), DType::bfloat16, {relu, add_relu});
  add(resnet50(32), DType::bfloat16, {none, relu, add_relu});
  add(resnet50(256), DType::bfloat16, {none, relu, add_relu});
  add(others, DType::bfloat16, {none, relu, add_relu});
  add(resnet50(128), DType::float32, {relu, add_relu});
  add(resnet50(32), DType::float32, {none, relu, add_relu});
  add(others, DType::float32, {none, relu, add_relu});
  add(resnet50(256), DType::float32, {none, relu, add_relu});
  return ops;
}

// Returns ops of a few megabytes whose stream plans have several tiles, splits and chunks, of every kind of tile; the
// last ones are ragged: splits of different sizes, chunks that are not full, a last tile that is narrower.
inline std::vector<Op> checked_ops() {
  const Layout layouts[] = {
      {32, 256, 784}, {25088, 256, 1}, {32, 512, 196}, {64, 512, 49}, {6272, 1024, 1}, {3136, 2048, 1},
      {32, 64, 3136}, {100352, 64, 1}, {3, 8, 64},     {37, 24, 1},   {1, 3, 4096},    {37, 149, 1568},
      {5003, 264, 1}, {61, 30, 196},   {45, 200, 49},  {37, 24, 144}, {7, 5, 30008},   {40001, 40, 1},
  };
  std::vector<Op> ops;
  for (DType dtype : {DType::bfloat16, DType::float32, DType::float16})
    for (const Layout& layout : layouts)
      for (Direction direction : {Direction::forward, Direction::backward})
        for (Epilogue epilogue : {none, add_relu, relu, silu, add_silu})
          ops.push_back({layout, dtype, direction, epilogue});
  return ops;
}

// Returns the plans for an op: in two phases as the planner has it, and with other numbers of blocks; then the stream
// plans with channel tiles of every width, with every number of groups, and with every number of tiles ahead.
inline std::vector<Plan> plans_of(const Op& op, const DeviceLimits& limits) {
  const Request request = planned_request(op.request());
  const Plan two_phase = choose_two_phase(request, limits);
  std::vector<Plan> plans{two_phase};
  const int64_t max_splits = max_splits_of(op.layout, two_phase);
  for (int blocks_per_sm : {4, 8}) {
    Plan plan = two_phase;
    const int64_t splits = std::clamp<int64_t>(limits.sm_count * blocks_per_sm / plan.tiles, 1, max_splits);
    plan.set_splits(op.layout, static_cast<int>(splits));
    plan.last_splits = plan.splits;
    if (plan.splits != plans.back().splits) plans.push_back(plan);
  }
  for_each_stream_plan(request, limits, two_phase, Ahead::any, [&](const Plan& plan) { plans.push_back(plan); });
  for (Plan& plan : plans) add_traffic(op.request(), plan);
  return plans;
}

constexpr const char* plan_columns =
    "schedule,kernel,fold,vectors_per_row,channels_per_tile,tiles,groups,splits,last_splits,ahead,chunks,"
    "chunks_per_tile,chunk_bytes,tensors,tensor_reads,tensor_writes";

inline std::string columns_of(const Plan& plan) {
  const StreamPlan& stream = plan.stream;
  const bool streams = plan.schedule == Schedule::stream;
  char text[300];
  std::snprintf(text, sizeof text, "%s,%s,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%g,%g", streams ? "stream" : "two_phase",
                plan.kernel == Kernel::row_tiles ? "row_tiles" : "channel_tiles", plan.fold, plan.vectors_per_row,
                plan.channels_per_tile, plan.tiles, plan.groups, plan.splits, streams ? plan.splits : plan.last_splits,
                stream.ahead, stream.ring_tiles * stream.chunks_per_tile, stream.chunks_per_tile,
                stream.tensors * stream.vectors_per_split * 16 / std::max(stream.chunks_per_tile, 1), stream.tensors,
                plan.tensor_reads, plan.tensor_writes);
  return text;
}

}  // namespace fastbn::bench
