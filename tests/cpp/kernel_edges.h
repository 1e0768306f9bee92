// The edge cases of the contract: constant, huge, infinite and empty input, and the counter of batches.
#pragma once

#include "kernel_case.h"

namespace fastbn::test {

// Checks that a constant channel gives exactly its bias.
template <class T>
void test_constant(const Shape& shape, double value) {
  Case<T> a(shape);
  for (int64_t i = 0; i < a.input.size; ++i) a.input.data()[i] = from_acc<T>(acc_t<T>(value));
  CHECK_EQUAL(a.forward(a.forward_params(Statistics::batch, Activation::none, false)), cudaSuccess);
  for (int64_t i = 0; i < a.input.size; ++i) CHECK_EQUAL(a.output.at(i), a.channels.bias[channel_of(a.layout, i)]);
  for (double inv_std : a.inv_std) CHECK_EQUAL(inv_std, 1 / std::sqrt(kEps));
}

// Calls `check(channel, mean, var, mean in double, var in double)` for float input, each value of which is replaced by
// `change(value, index)`.
template <class Change, class Check>
void test_stats(const Shape& shape, Change change, Check check) {
  Case<float> a(shape);
  for (int64_t i = 0; i < a.input.size; ++i) a.input.data()[i] = float(change(a.input.at(i), i));
  reference_stats(a.layout, a.input, a.channels.mean, a.var);
  ForwardParams p = a.forward_params(Statistics::batch, Activation::none, false);
  Doubles var(a.layout.channels, NAN);
  p.var = var.data();
  CHECK_EQUAL(cuda::channel_stats(p, a.plan, a.workspace.data(), nullptr), cudaSuccess);
  for (int64_t k = 0; k < a.layout.channels; ++k) check(k, a.mean[k], var[k], a.channels.mean[k], a.var[k]);

  // A forward must give the same.
  p.var = nullptr;
  a.mean.assign(a.layout.channels, NAN);
  CHECK_EQUAL(a.forward(p), cudaSuccess);
  for (int64_t k = 0; k < a.layout.channels; ++k) {
    check(k, a.mean[k], 1 / (a.inv_std[k] * a.inv_std[k]) - kEps, a.channels.mean[k], a.var[k]);
  }
}

void test_extremes(const Shape& shape) {
  const auto close = [](int64_t, double mean, double var, double true_mean, double true_var) {
    CHECK_NEAR(mean, true_mean, 1e-6 * std::sqrt(true_var));
    CHECK_NEAR(var, true_var, 4e-6 * true_var);
  };
  test_stats(shape, [](double x, int64_t) { return x * 1e30; }, close);
  test_stats(shape, [](double x, int64_t) { return 1e4 + 0.01 * x; }, close);
  test_stats(shape, [](double x, int64_t) { return 1e6 + x; }, close);

  // A value that is not finite, in the first or last element of channel 0, does not affect the other channels.
  for (double value : {kInfinity, -kInfinity, double(NAN)}) {
    for (int64_t index : {int64_t(0), shape.layout.count() - 1}) {
      const int64_t inner = shape.layout.inner;
      const int64_t at = index / inner * inner * shape.layout.channels + index % inner;
      test_stats(
          shape, [=](double x, int64_t i) { return i == at ? value : x; },
          [&](int64_t channel, double mean, double var, double true_mean, double true_var) {
            if (channel != 0) return close(channel, mean, var, true_mean, true_var);
            CHECK(std::isnan(value) ? std::isnan(mean) : mean == value);
            CHECK(std::isnan(var));
          });
    }
  }
}

// Checks that an empty batch is counted and changes no running statistics.
void test_empty(const Layout& layout) {
  Case<float> a({layout, 0, 0, 0});
  const int64_t channels = layout.channels;
  int64_t batches = 0;
  ForwardParams p = a.forward_params(Statistics::batch, Activation::relu, false);
  p.running_mean = vector_of(a.running_mean);
  p.running_var = vector_of(a.running_var);
  p.num_batches_tracked = &batches;
  p.momentum = 0.1;
  const Doubles running_var = a.running_var;
  CHECK_EQUAL(a.forward(p), cudaSuccess);
  CHECK_EQUAL(batches, 1);
  CHECK(a.running_mean == Doubles(channels, -2.5) && a.running_var == running_var);
  CHECK(a.mean == Doubles(channels, 0) && a.inv_std == Doubles(channels, 1 / std::sqrt(kEps)));

  Doubles var(channels, NAN);
  p.var = var.data();
  a.mean.assign(channels, NAN);
  CHECK_EQUAL(cuda::channel_stats(p, a.plan, a.workspace.data(), nullptr), cudaSuccess);
  CHECK_EQUAL(batches, 1);
  CHECK(a.mean == Doubles(channels, 0) && var == Doubles(channels, 0));

  BackwardParams b = a.backward_params(Statistics::batch, Activation::relu);
  CHECK_EQUAL(a.backward(b), cudaSuccess);
  CHECK(a.grad_weight == Doubles(channels, 0) && a.grad_bias == Doubles(channels, 0));

  // So it is with a negative running variance.
  a.channels.inv_std.assign(channels, NAN);
  b = a.backward_params(Statistics::running, Activation::relu);
  CHECK_EQUAL(a.backward(b), cudaSuccess);
  CHECK(a.grad_weight == Doubles(channels, 0) && a.grad_bias == Doubles(channels, 0));
}

// Checks that the counter holds its old or its new value at every moment, since a killed launch may leave it in a
// checkpoint. If a block reads the new value instead of the old one, the average is off.
void test_counter(const Shape& shape) {
  for (bool has_momentum : {false, true}) {
    Case<float> a(shape);
    int64_t batches = 3, foreign = 0, moments = 0;
    ForwardParams p = a.forward_params(Statistics::batch, Activation::none, false);
    p.running_mean = vector_of(a.running_mean);
    p.running_var = vector_of(a.running_var);
    p.num_batches_tracked = &batches;
    p.has_momentum = has_momentum;
    p.momentum = 0.25;
    emulator::set_observer([&] {
      ++moments;
      foreign += batches != 3 && batches != 4;
    });
    CHECK_EQUAL(a.forward(p), cudaSuccess);
    emulator::set_observer({});
    CHECK_EQUAL(batches, 4);
    CHECK_EQUAL(foreign, 0);
    CHECK(moments > a.plan.threads);
    for (int64_t k = 0; k < a.layout.channels; ++k) {
      CHECK_NEAR(a.running_mean[k], -2.5 + 0.25 * (a.channels.mean[k] + 2.5), arithmetic<float>);
    }
  }
}

// Checks that a channel of one element has a NaN for its unbiased variance.
void test_single(const Layout& layout) {
  Case<float> a({layout, 0, 0, 0});
  ForwardParams p = a.forward_params(Statistics::batch, Activation::none, false);
  p.running_mean = vector_of(a.running_mean);
  p.running_var = vector_of(a.running_var);
  p.momentum = 0.5;
  CHECK_EQUAL(a.forward(p), cudaSuccess);
  for (int64_t k = 0; k < layout.channels; ++k) {
    CHECK_EQUAL(a.output.at(k), a.channels.bias[k]);
    CHECK_EQUAL(a.running_mean[k], 0.5 * -2.5 + 0.5 * a.input.at(k));
    CHECK(std::isnan(a.running_var[k]));
  }
}

// Runs those that have a shape.
inline void test_edges_of(const Shape& shape) {
  test_constant<float>(shape, 10000.1);
  test_constant<float>(shape, 3e38);
  test_constant<double>(shape, 1e200 / 3);
  test_constant<bfloat16>(shape, -7.3);
  test_constant<float16>(shape, 60000);
  test_extremes(shape);
  test_counter(shape);
}

}  // namespace fastbn::test
