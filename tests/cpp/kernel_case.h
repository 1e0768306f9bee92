// One case of the kernels on the emulator, and its checks against the definitions in double. A case runs in two phases,
// or where its shape says so as a stream plan.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "cuda/launch.h"
#include "emulator.h"
#include "kernel_reference.h"
#include "plan/planner.h"

namespace fastbn::test {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEps = 1e-5;

// The tiles and the ring of a stream plan.
struct StreamShape {
  Kernel kernel = Kernel::channel_tiles;
  int channels = 0;     // per tile; 0: as many as fill `row_vectors`, or one (channel_tiles)
  int row_vectors = 0;  // of a tile
  int groups = 0;       // 0: the plan is in two phases
  int splits = 1;
  int ahead = 0;
  int spare_tiles = 0;  // of the ring, beyond those that keep it live
};

struct Shape {
  Layout layout;
  int threads = 0;  // per block, at least one per vector of a row; 0: as planned
  int splits = 0;
  int64_t shift = 0;
  StreamShape stream = {};
};

template <class T>
Plan plan_of(const Shape& shape, bool masked) {
  Request request;
  request.layout = shape.layout;
  request.dtype = dtype_of<T>;
  request.aligned = shape.shift == 0;
  request.fused = false;
  request.masked = masked;
  Plan plan = choose_plan(request, known_devices[2]);
  if (shape.threads) plan.threads = std::max(shape.threads, (plan.vectors_per_row + 31) / 32 * 32);
  if (shape.splits) {
    plan.set_splits(shape.layout, shape.splits);
    plan.last_splits = shape.splits + 1;
  }
  return plan;
}

// Returns the stream plan of a shape.
template <class T>
Plan stream_plan_of(const Shape& shape, const Request& request) {
  const StreamShape& wanted = shape.stream;
  int64_t channels = wanted.channels;
  if (channels == 0) channels = wanted.kernel == Kernel::row_tiles ? wanted.row_vectors * (16 / sizeof(T)) : 1;
  Plan plan;
  CHECK(can_stream(request) && set_stream_tiles(request, wanted.kernel, channels, plan));
  plan.groups = std::min(wanted.groups, plan.tiles);
  // A chunk of three tensors leaves room for fewer tiles, or smaller parts.
  const int64_t room = known_devices[2].shared_bytes_per_block;
  int splits = wanted.splits, ahead = wanted.ahead;
  set_stream_splits(splits, plan);
  while (!set_ring(request, ahead, room, plan) && splits < 100) {
    if (--ahead < 0) {
      ahead = wanted.ahead;
      set_stream_splits(++splits, plan);
    }
  }
  plan.stream.ring_tiles = std::min(plan.stream.ring_tiles, ahead + 1 + wanted.spare_tiles);
  CHECK(is_live(plan.stream));
  plan.shared_bytes = stream_shared_bytes(plan, request.direction);
  return plan;
}

// Everything that one case needs, and the parameters that point to it.
template <class T>
struct Case {
  Shape shape;
  Layout layout = shape.layout;
  Plan plan;
  Tensor<T> input, residual, grad_out, output, grad_input, grad_residual;
  Tensor<uint8_t> mask;
  Channels channels;
  Doubles var, running_mean, running_var, mean, inv_std, grad_weight, grad_bias;
  Doubles workspace;

  explicit Case(const Shape& shape, bool masked = false)
      : shape(shape),
        input(random_tensor<T>(layout.numel(), 1, -3, shape.shift)),  // so that a padding 0 would pass for active
        residual(random_tensor<T>(layout.numel(), 2, 0.5, shape.shift)),
        grad_out(random_tensor<T>(layout.numel(), 3, 0.25, shape.shift)),
        output(layout.numel(), shape.shift),
        grad_input(layout.numel(), shape.shift),
        grad_residual(layout.numel(), shape.shift),
        mask(layout.runs() * layout.mask_bytes_per_run()) {
    reference_stats(layout, input, channels.mean, var);
    const int64_t count = layout.channels;
    for (int64_t c = 0; c < count; ++c) {
      channels.inv_std.push_back(1 / std::sqrt(var[c] + kEps));
      channels.weight.push_back(1.5 - 0.25 * double(c % 5));
      channels.bias.push_back(0.75 * double(c % 3));
      running_mean.push_back(-2.5);
      running_var.push_back(1.5 + 0.125 * double(c % 4));
    }
    for (Doubles* values : {&mean, &inv_std, &grad_weight, &grad_bias}) values->assign(count, NAN);
    choose(masked);
  }

  void choose(bool masked) {
    plan = plan_of<T>(shape, masked);
    ForwardParams p;
    p.layout = layout;
    allocate(cuda::workspace_bytes(plan, p));
  }

  void allocate(int64_t bytes) { workspace.assign((bytes + sizeof(double) - 1) / sizeof(double), NAN); }

  // Leaves messages of an earlier launch in the workspace, whose flags are those of the first exchanges.
  void leave_messages() {
    auto* words = reinterpret_cast<uint32_t*>(workspace.data());
    for (size_t i = 0; i < 2 * workspace.size(); ++i) words[i] = 1 + i / 64 % 3;
  }

  template <class Params>
  bool streams(const Params& p) const {
    return shape.stream.groups > 0 && sizeof(T) < 8 && p.statistics == Statistics::batch;
  }

  // Returns the plan of an op: with the statistics of the batch it may be a stream plan, and then gets a workspace.
  template <class Params>
  Plan plan_for(const Params& p, Direction direction) {
    if (!streams(p)) return plan;
    Request request{layout, dtype_of<T>, direction, p.activation};
    request.residual = p.residual != nullptr;
    request.masked = p.mask != nullptr;
    const Plan stream = stream_plan_of<T>(shape, request);
    allocate(std::max(cuda::workspace_bytes(stream, p), cuda::workspace_bytes(plan, p)));
    leave_messages();
    return stream;
  }

  ForwardParams forward_params(Statistics statistics, Activation activation, bool with_residual) {
    ForwardParams p;
    p.layout = layout;
    p.dtype = dtype_of<T>;
    p.activation = activation;
    p.activation_param = ActivationParam(param_of(activation));
    p.statistics = statistics;
    p.input = input.data();
    p.residual = with_residual ? residual.data() : nullptr;
    p.output = output.data();
    p.mask = with_residual ? mask.data() : nullptr;
    p.weight = vector_of(channels.weight);
    p.bias = vector_of(channels.bias);
    p.eps = kEps;
    p.mean = mean.data();
    p.inv_std = inv_std.data();
    return p;
  }

  BackwardParams backward_params(Statistics statistics, Activation activation) {
    BackwardParams p;
    p.layout = layout;
    p.dtype = dtype_of<T>;
    p.activation = activation;
    p.activation_param = ActivationParam(param_of(activation));
    p.statistics = statistics;
    p.grad_out = grad_out.data();
    p.input = input.data();
    p.weight = vector_of(channels.weight);
    p.bias = vector_of(channels.bias);
    p.mean = channels.mean.data();
    p.inv_std = channels.inv_std.data();
    p.grad_input = grad_input.data();
    p.grad_weight = vector_of(grad_weight);
    p.grad_bias = vector_of(grad_bias);
    return p;
  }

  cudaError_t forward(const ForwardParams& p) {
    const Plan chosen = plan_for(p, Direction::forward);
    return cuda::forward(p, chosen, workspace.data(), nullptr);
  }
  cudaError_t backward(const BackwardParams& p) {
    const Plan chosen = plan_for(p, Direction::backward);
    return cuda::backward(p, chosen, workspace.data(), nullptr);
  }
};

template <class T>
void check_output(const Case<T>& a, const Channels& c, Activation activation, bool with_residual, bool masked) {
  for (int64_t i = 0; i < a.layout.numel(); ++i) {
    const double z = reference_z(a.layout, c, a.input, with_residual ? &a.residual : nullptr, i);
    const double y = activation_forward(activation, z, param_of(activation));
    CHECK_NEAR(a.output.at(i), y, rounding<T>(y) + arithmetic<T> * (1 + std::fabs(z)));
    if (masked) CHECK_EQUAL(mask_bit(a.layout, a.mask.data(), i), bool(activation_is_upper(activation, z)));
  }
  const int64_t tail = a.layout.run() % 8, bytes = a.layout.mask_bytes_per_run();
  for (int64_t last = bytes - 1; masked && tail && last < a.mask.size; last += bytes) {
    CHECK_EQUAL(a.mask.data()[last] >> tail, 0);
  }
}

template <class T>
void test_forward(const Shape& shape, Activation activation, bool with_residual) {
  Case<T> a(shape, with_residual);
  const double n = double(a.layout.count());
  Channels c = a.channels;

  int64_t batches = 3;
  ForwardParams p = a.forward_params(Statistics::batch, activation, with_residual);
  // A run that does not fill bytes of the mask has no mask in a stream plan.
  if (a.streams(p) && a.layout.run() % 8 != 0) p.mask = nullptr;
  Doubles running_mean = a.running_mean, running_var = a.running_var;
  p.running_mean = vector_of(running_mean);
  p.running_var = vector_of(running_var);
  p.num_batches_tracked = &batches;
  p.has_momentum = with_residual;
  p.momentum = 0.1;
  const double factor = p.has_momentum ? 0.1 : 0.25;
  CHECK_EQUAL(a.forward(p), cudaSuccess);
  CHECK_EQUAL(batches, 4);
  check_output(a, c, activation, with_residual, p.mask != nullptr);
  for (int64_t k = 0; k < a.layout.channels; ++k) {
    CHECK_NEAR(a.mean[k], c.mean[k], arithmetic<T>);
    CHECK_NEAR(a.inv_std[k], c.inv_std[k], arithmetic<T> * c.inv_std[k]);
    CHECK_NEAR(running_mean[k], -2.5 + factor * (c.mean[k] + 2.5), arithmetic<T>);
    CHECK_NEAR(running_var[k], a.running_var[k] + factor * (a.var[k] * n / (n - 1) - a.running_var[k]), arithmetic<T>);
  }

  p = a.forward_params(Statistics::running, activation, with_residual);
  p.running_mean = vector_of(a.running_mean);
  p.running_var = vector_of(a.running_var);
  c.mean = a.running_mean;
  for (int64_t k = 0; k < a.layout.channels; ++k) c.inv_std[k] = 1 / std::sqrt(a.running_var[k] + kEps);
  CHECK_EQUAL(cuda::forward(p, a.plan, nullptr, nullptr), cudaSuccess);
  check_output(a, c, activation, with_residual, p.mask != nullptr);
  CHECK(a.mean == c.mean && a.inv_std == c.inv_std);

  p = a.forward_params(Statistics::given, activation, with_residual);
  a.mean = a.channels.mean;
  CHECK_EQUAL(cuda::forward(p, a.plan, nullptr, nullptr), cudaSuccess);
  c.mean = a.channels.mean;
  check_output(a, c, activation, with_residual, p.mask != nullptr);
}

template <class T>
void check_gradients(const Case<T>& a, const Gradients& g, Statistics statistics, bool with_residual, double factor) {
  const double n = double(a.layout.count()) * factor;
  for (int64_t k = 0; k < a.layout.channels && statistics != Statistics::given; ++k) {
    CHECK_NEAR(a.grad_bias[k], g.sum[k], arithmetic<T> * (1 + g.absolute_sum[k]));
    CHECK_NEAR(a.grad_weight[k], g.sum_xhat[k], arithmetic<T> * (1 + g.absolute_sum_xhat[k]));
  }
  for (int64_t i = 0; i < a.layout.numel(); ++i) {
    const int64_t k = channel_of(a.layout, i);
    double grad = g.z[i];
    if (statistics != Statistics::running) {
      const double xhat = (a.input.at(i) - a.channels.mean[k]) * a.channels.inv_std[k];
      grad -= factor * (g.sum[k] / n + xhat * g.sum_xhat[k] / n);
    }
    grad *= a.channels.weight[k] * a.channels.inv_std[k];
    const double scale = arithmetic<T> * 10 * std::max(1.0, a.channels.inv_std[k]);
    CHECK_NEAR(a.grad_input.at(i), grad, rounding<T>(grad) + scale);
    if (with_residual) CHECK_NEAR(a.grad_residual.at(i), g.z[i], rounding<T>(g.z[i]) + scale);
  }
}

template <class T>
void test_backward(const Shape& shape, Activation activation, bool with_residual) {
  Case<T> a(shape);
  const Tensor<T>* residual = with_residual ? &a.residual : nullptr;
  const Gradients g = reference_gradients(a.layout, a.channels, activation, a.grad_out, a.input, residual);
  for (int64_t i = 0; i < a.mask.size; ++i) a.mask.data()[i] = 0;
  for (int64_t i = 0; i < a.layout.numel(); ++i) {
    const bool upper = activation_is_upper(activation, reference_z(a.layout, a.channels, a.input, residual, i));
    const int64_t index = i % a.layout.run();
    if (upper) a.mask.data()[i / a.layout.run() * a.layout.mask_bytes_per_run() + index / 8] |= 1 << index % 8;
  }
  Doubles sums(a.layout.channels), sums_xhat(a.layout.channels);
  const bool fills_bytes = shape.stream.groups == 0 || shape.layout.run() % 8 == 0;
  const bool masks = with_residual && is_piecewise_linear(activation) && fills_bytes;
  for (int masked = 0; masked <= masks; ++masked) {
    a.choose(masked);
    const auto params = [&](Statistics statistics) {
      BackwardParams p = a.backward_params(statistics, activation);
      if (with_residual) p.grad_residual = a.grad_residual.data();
      if (with_residual && !masked) p.residual = a.residual.data();
      if (masked) p.mask = a.mask.data();
      return p;
    };
    for (Statistics statistics : {Statistics::batch, Statistics::running}) {
      CHECK_EQUAL(a.backward(params(statistics)), cudaSuccess);
      check_gradients(a, g, statistics, with_residual, 1);
    }
    BackwardParams p = params(Statistics::given);
    p.sum_grad = sums.data();
    p.sum_grad_xhat = sums_xhat.data();
    CHECK_EQUAL(cuda::grad_sums(p, a.plan, a.workspace.data(), nullptr), cudaSuccess);
    // The sums and the count are those of two ranks that have seen the same data.
    const double count = 2 * double(a.layout.count());
    for (int64_t k = 0; k < a.layout.channels; ++k) {
      CHECK_NEAR(sums[k], g.sum[k], arithmetic<T> * (1 + g.absolute_sum[k]));
      CHECK_NEAR(sums_xhat[k], g.sum_xhat[k], arithmetic<T> * (1 + g.absolute_sum_xhat[k]));
      sums[k] *= 2;
      sums_xhat[k] *= 2;
    }
    p.count = &count;
    CHECK_EQUAL(cuda::backward(p, a.plan, nullptr, nullptr), cudaSuccess);
    check_gradients(a, g, Statistics::given, with_residual, 2);
  }
}

// Checks that results have the same bits in whatever order threads and blocks run.
template <class T>
void test_seeds(const Shape& shape) {
  Doubles first;
  for (int seed = 0; seed < 8; ++seed) {
    emulator::set_seed(seed);
    Case<T> a(shape);
    CHECK_EQUAL(a.forward(a.forward_params(Statistics::batch, Activation::silu, false)), cudaSuccess);
    CHECK_EQUAL(a.backward(a.backward_params(Statistics::batch, Activation::silu)), cudaSuccess);
    Doubles all;
    for (const Doubles* values : {&a.mean, &a.inv_std, &a.grad_weight, &a.grad_bias}) {
      all.insert(all.end(), values->begin(), values->end());
    }
    for (int64_t i = 0; i < a.layout.numel(); ++i) {
      all.push_back(a.output.at(i));
      all.push_back(a.grad_input.at(i));
    }
    if (seed == 0) first = all;
    CHECK(all == first);
  }
}

}  // namespace fastbn::test
