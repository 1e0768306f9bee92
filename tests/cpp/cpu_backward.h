// Checks backward and grad_sums of the CPU backend against the definitions in double.
#pragma once

#include "cpu_case.h"

namespace fastbn::test {

// The outputs of a backward op.
template <class T>
struct Backward {
  Tensor<T> grad_input, grad_residual;
  Tensor<Parameter<T>> grad_weight, grad_bias;

  bool operator==(const Backward& other) const {
    return same_bits(grad_input, other.grad_input) && same_bits(grad_residual, other.grad_residual) &&
           same_bits(grad_weight, other.grad_weight) && same_bits(grad_bias, other.grad_bias);
  }
};

// The gradients that are requested, and the source of the statistics.
struct Wanted {
  Statistics statistics;
  bool input, weight, bias;
};
inline const Wanted all_wanted[] = {
    {Statistics::batch, true, true, true},     {Statistics::batch, true, false, false},
    {Statistics::batch, false, true, false},   {Statistics::running, true, true, true},
    {Statistics::running, true, false, false}, {Statistics::running, false, false, true},
    {Statistics::given, true, false, false}};

// The backward of one activation, which gets z from the input alone, or from the residual or the mask as well.
template <class T>
struct BackwardTest {
  const Case<T>& a;
  Activation activation;
  Options options;
  bool masked;
  Channels c;
  Tensor<T> grad_out;
  Tensor<uint8_t> mask;
  Gradients exact;
  Tensor<double> mean, inv_std, sum_grad, sum_grad_xhat, count;

  BackwardTest(const Case<T>& a, Activation activation, const Options& options, bool masked)
      : a(a),
        activation(activation),
        options(options),
        masked(masked),
        c(a.channels(options, Statistics::batch)),
        grad_out(random_tensor<T>(a.layout.numel(), 3, 0.25, a.shift)),
        mask(a.new_mask()),
        mean(tensor_of<double>(c.mean, a.shift)),
        inv_std(tensor_of<double>(c.inv_std, a.shift)),
        sum_grad(a.layout.channels, a.shift),
        sum_grad_xhat(a.layout.channels, a.shift),
        count(1, a.shift) {
    const Layout& layout = a.layout;
    const Tensor<T>* residual = options.residual ? &a.residual : nullptr;
    std::memset(mask.data(), 0, mask.size);
    for (int64_t i = 0; i < layout.numel(); ++i) {
      const double z = reference_z(layout, c, a.input, residual, i);
      const int64_t run = i / layout.run(), index = i % layout.run();
      if (activation_is_upper(activation, z))
        mask.data()[run * layout.mask_bytes_per_run() + index / 8] |= 1 << index % 8;
      if (is_at_kink<T>(z)) grad_out.data()[i] = T{};
    }
    exact = reference_gradients(layout, c, activation, grad_out, a.input, residual);
    // The sums are those of two ranks with the same data.
    for (int64_t k = 0; k < layout.channels; ++k) {
      sum_grad.data()[k] = 2 * exact.sum[k];
      sum_grad_xhat.data()[k] = 2 * exact.sum_xhat[k];
    }
    *count.data() = 2 * double(layout.count());
  }

  BackwardParams params() const {
    BackwardParams p;
    p.layout = a.layout;
    p.dtype = dtype_of<T>;
    p.activation = activation;
    p.activation_param = ActivationParam(param_of(activation));
    p.grad_out = grad_out.data();
    p.input = a.input.data();
    p.residual = pointer_if(options.residual && !masked, a.residual);
    p.mask = pointer_if(masked, mask);
    p.weight = vector_if(options.weight, a.weight);
    p.bias = vector_if(options.bias, a.bias);
    p.mean = mean.data();
    p.inv_std = inv_std.data();
    return p;
  }

  Backward<T> run(const Wanted& wanted, const cpu::Threads& threads) const {
    const int64_t numel = a.layout.numel(), channels = a.layout.channels;
    Backward<T> out{Tensor<T>(numel, a.shift), Tensor<T>(numel, a.shift), Tensor<Parameter<T>>(channels, a.shift),
                    Tensor<Parameter<T>>(channels, a.shift)};
    BackwardParams p = params();
    p.statistics = wanted.statistics;
    p.grad_input = pointer_if(wanted.input, out.grad_input);
    p.grad_residual = pointer_if(options.residual, out.grad_residual);
    p.grad_weight = vector_if(wanted.weight, out.grad_weight);
    p.grad_bias = vector_if(wanted.bias, out.grad_bias);
    p.sum_grad = sum_grad.data();
    p.sum_grad_xhat = sum_grad_xhat.data();
    p.count = count.data();
    cpu::backward(p, threads);
    return out;
  }

  std::pair<Doubles, Doubles> run_sums(const cpu::Threads& threads) const {
    std::pair<Doubles, Doubles> out{Doubles(a.layout.channels, NAN), Doubles(a.layout.channels, NAN)};
    BackwardParams p = params();
    p.sum_grad = out.first.data();
    p.sum_grad_xhat = out.second.data();
    cpu::grad_sums(p, threads);
    return out;
  }

  void test_gradients(const Wanted& wanted) const {
    const Backward<T> out = same_for_all_threads([&](const cpu::Threads& threads) { return run(wanted, threads); });
    for (int64_t k = 0; k < a.layout.channels; ++k) {
      if (wanted.bias) CHECK_NEAR(out.grad_bias.at(k), exact.sum[k], sum_bound(exact.absolute_sum[k]));
      if (wanted.weight) CHECK_NEAR(out.grad_weight.at(k), exact.sum_xhat[k], sum_bound(exact.absolute_sum_xhat[k]));
    }
    const double n = double(a.layout.count());
    for (int64_t i = 0; i < a.layout.numel(); ++i) {
      const int64_t k = channel_of(a.layout, i);
      const double bound = arithmetic<T> * 10 * std::max(1.0, c.inv_std[k]);
      const double xhat = (a.input.at(i) - c.mean[k]) * c.inv_std[k];
      const double through_stats = exact.sum[k] / n + xhat * exact.sum_xhat[k] / n;
      const double grad =
          (exact.z[i] - (wanted.statistics == Statistics::running ? 0 : through_stats)) * c.weight[k] * c.inv_std[k];
      if (wanted.input) CHECK_NEAR(out.grad_input.at(i), grad, rounding<T>(grad) + bound);
      if (options.residual) CHECK_NEAR(out.grad_residual.at(i), exact.z[i], rounding<T>(exact.z[i]) + bound);
    }
  }

  void test_sums() const {
    const auto sums = same_for_all_threads([&](const cpu::Threads& threads) { return run_sums(threads); });
    for (int64_t k = 0; k < a.layout.channels; ++k) {
      CHECK_NEAR(sums.first[k], exact.sum[k], sum_bound(exact.absolute_sum[k]));
      CHECK_NEAR(sums.second[k], exact.sum_xhat[k], sum_bound(exact.absolute_sum_xhat[k]));
    }
  }

  static double sum_bound(double absolute_sum) { return arithmetic<T> * (1 + absolute_sum); }
};

// Checks that grad_z of relu and its sums have the same bits from batch statistics, for which some instruction sets
// compare x with a threshold, as from frozen ones, for which all of them recompute z. It covers every finite bfloat16
// and thresholds of either sign, next to and at zero, beyond all elements, and absent.
inline void test_relu_thresholds() {
  using T = bfloat16;
  const Channels c = {
      .mean = {0, 0, 0.3, 0.3, -2, -2, 1, 1, 5, 5, 0, 0, 0, 0, 0, 0, 0, 1e5, NAN, 0, 0.5, 0.5, 3e38, 3e38},
      .inv_std = {1,    1, 1.7, 1.7, 0.6, 0.6, 0.7, 0.7, 1e-30, 1e30, 1e-44, 1e-3,
                  1e-3, 1, 1,   1,   1,   1,   1,   NAN, 1e37,  1e37, 1,     1},
      .weight = {1, -1, 1, -1, 1, -1, 1, 1, 1, -1, 1, 1, 1, -1, 0, 0, 0, 1, 1, 1, 1, -1, 0, 0},
      .bias = {0,     0,    0, 0,  -3, -3,  0.7000001, 0.6999999, 1e30, 1,  0, 3e38,
               -3e38, 3e38, 1, -1, 0,  0.1, 0,         0,         -1,   -1, 1, -1}};
  const int64_t channels = int64_t(c.mean.size()), patterns = 65536;
  for (const Layout& layout : {Layout{1, channels, patterns}, Layout{patterns, channels, 1}}) {
    const Tensor<T> input(layout.numel()), grad_out = random_tensor<T>(layout.numel(), 4, 0.25);
    for (int64_t i = 0; i < layout.numel(); ++i) {
      const uint32_t bits = uint32_t(layout.inner > 1 ? i % patterns : i / channels) << 16;
      const float x = bit_cast<float>(bits);
      input.data()[i] = from_acc<T>(acc_t<T>(std::isfinite(x) ? x : 1));
    }
    const Tensor<double> mean = tensor_of<double>(c.mean, 0), inv_std = tensor_of<double>(c.inv_std, 0);
    const Tensor<Parameter<T>> weight = tensor_of<Parameter<T>>(c.weight, 0), bias = tensor_of<Parameter<T>>(c.bias, 0);
    auto run = [&](Statistics statistics) {
      const Backward<T> out{Tensor<T>(layout.numel()), Tensor<T>(layout.numel()), Tensor<Parameter<T>>(channels),
                            Tensor<Parameter<T>>(channels)};
      BackwardParams p;
      p.layout = layout;
      p.dtype = dtype_of<T>;
      p.activation = Activation::relu;
      p.statistics = statistics;
      p.grad_out = grad_out.data();
      p.input = input.data();
      p.weight = vector_if(true, weight);
      p.bias = vector_if(true, bias);
      p.mean = mean.data();
      p.inv_std = inv_std.data();
      p.grad_residual = out.grad_residual.data();
      p.grad_weight = vector_if(true, out.grad_weight);
      p.grad_bias = vector_if(true, out.grad_bias);
      cpu::backward(p, {1, run_in_order});
      return out;
    };
    CHECK(run(Statistics::batch) == run(Statistics::running));
  }
}

// Checks that a NaN takes relu's upper branch, whatever its sign and its weight's, even if statistics are frozen and so
// not NaN: grad_out passes bit for bit.
template <class T>
void test_relu_passes_gradients_of_nan() {
  constexpr int64_t channels = 4, count = 128;
  const Tensor<double> mean = tensor_of<double>({0, 0, 0.5, 0.5}, 0), inv_std = tensor_of<double>({1, 1, 2, 2}, 0);
  const Tensor<Parameter<T>> weight = tensor_of<Parameter<T>>({1, -1, 1, -1}, 0);
  for (const Layout& layout : {Layout{1, channels, count}, Layout{count, channels, 1}}) {
    const Tensor<T> grad_out = random_tensor<T>(layout.numel(), 5, 0.25), grad_residual(layout.numel());
    Tensor<T> input(layout.numel());  // all bits are 1, which is a NaN with a sign
    for (int64_t i = 0; i < layout.numel(); i += 3) input.data()[i] = from_acc<T>(acc_t<T>(NAN));
    BackwardParams p;
    p.layout = layout;
    p.dtype = dtype_of<T>;
    p.activation = Activation::relu;
    p.statistics = Statistics::running;
    p.grad_out = grad_out.data();
    p.input = input.data();
    p.weight = vector_if(true, weight);
    p.mean = mean.data();
    p.inv_std = inv_std.data();
    p.grad_residual = grad_residual.data();
    cpu::backward(p, {1, run_in_order});
    CHECK(same_bits(grad_residual, grad_out));
  }
}

}  // namespace fastbn::test
