// Checks forward and channel_stats of the CPU backend against the definitions in double.
#pragma once

#include "cpu_case.h"

namespace fastbn::test {

// The outputs of a forward op. Those that it does not write keep their initial values.
template <class T>
struct Forward {
  Tensor<T> output;
  Tensor<uint8_t> mask;
  Tensor<double> mean, inv_std;
  Tensor<Parameter<T>> running_mean, running_var;
  int64_t batches;

  bool operator==(const Forward& other) const {
    return same_bits(output, other.output) && same_bits(mask, other.mask) && same_bits(mean, other.mean) &&
           same_bits(inv_std, other.inv_std) && same_bits(running_mean, other.running_mean) &&
           same_bits(running_var, other.running_var) && batches == other.batches;
  }
};

template <class T>
Forward<T> run_forward(const Case<T>& a, const Channels& c, Statistics statistics, Activation activation,
                       const Options& options, const cpu::Threads& threads) {
  const bool given = statistics == Statistics::given, is_batch = statistics == Statistics::batch;
  Forward<T> out{Tensor<T>(a.layout.numel(), a.shift),
                 a.new_mask(),
                 given ? tensor_of<double>(c.mean, a.shift) : Tensor<double>(a.layout.channels, a.shift),
                 given ? tensor_of<double>(c.inv_std, a.shift) : Tensor<double>(a.layout.channels, a.shift),
                 tensor_of<Parameter<T>>(a.running_mean, a.shift),
                 tensor_of<Parameter<T>>(a.running_var, a.shift),
                 3};
  ForwardParams p;
  p.layout = a.layout;
  p.dtype = dtype_of<T>;
  p.activation = activation;
  p.activation_param = ActivationParam(param_of(activation));
  p.statistics = statistics;
  p.input = a.input.data();
  p.residual = pointer_if(options.residual, a.residual);
  p.output = out.output.data();
  p.mask = pointer_if(options.mask, out.mask);
  p.weight = vector_if(options.weight, a.weight);
  p.bias = vector_if(options.bias, a.bias);
  p.running_mean = vector_if(options.buffers || statistics == Statistics::running, out.running_mean);
  p.running_var = vector_if(options.buffers || statistics == Statistics::running, out.running_var);
  p.num_batches_tracked = options.buffers && is_batch ? &out.batches : nullptr;
  p.has_momentum = options.residual;
  p.momentum = 0.1;
  p.eps = kEps;
  p.mean = pointer_if(options.stats || given, out.mean);
  p.inv_std = pointer_if(options.stats || given, out.inv_std);
  cpu::forward(p, threads);
  return out;
}

template <class T>
void check_running(const Case<T>& a, const Forward<T>& out, double factor) {
  const double n = double(a.layout.count());
  for (int64_t k = 0; k < a.layout.channels; ++k) {
    const double mean = a.running_mean[k] + factor * (a.batch.mean[k] - a.running_mean[k]);
    CHECK_NEAR(out.running_mean.at(k), mean, arithmetic<T> * (1 + std::fabs(mean)));
    const double var = a.running_var[k] + factor * (a.var[k] * n / (n - 1) - a.running_var[k]);
    if (n == 1)  // 0/0 times any factor
      CHECK(std::isnan(out.running_var.at(k)));
    else
      CHECK_NEAR(out.running_var.at(k), var, arithmetic<T> * (1 + var));
  }
}

template <class T>
void test_forward(const Case<T>& a, Statistics statistics, Activation activation, const Options& options) {
  const Channels c = a.channels(options, statistics);
  const Forward<T> out = same_for_all_threads(
      [&](const cpu::Threads& threads) { return run_forward(a, c, statistics, activation, options, threads); });
  for (int64_t i = 0; i < a.layout.numel(); ++i) {
    const double z = reference_z(a.layout, c, a.input, options.residual ? &a.residual : nullptr, i);
    const double y = activation_forward(activation, z, param_of(activation));
    CHECK_NEAR(out.output.at(i), y, rounding<T>(y) + arithmetic<T> * (1 + std::fabs(z)));
    if (options.mask && !is_at_kink<T>(z))
      CHECK_EQUAL(mask_bit(a.layout, out.mask.data(), i), bool(activation_is_upper(activation, z)));
  }
  const int64_t tail = a.layout.run() % 8, bytes = a.layout.mask_bytes_per_run();
  for (int64_t last = bytes - 1; options.mask && tail && last < out.mask.size; last += bytes)
    CHECK_EQUAL(out.mask.data()[last] >> tail, 0);
  const bool is_batch = statistics == Statistics::batch;
  for (int64_t k = 0; k < a.layout.channels && options.stats; ++k) {
    CHECK_NEAR(out.mean.at(k), c.mean[k], is_batch ? arithmetic<T> : 0);
    CHECK_NEAR(out.inv_std.at(k), c.inv_std[k], is_batch ? arithmetic<T> * c.inv_std[k] : 0);
  }
  if (is_batch && options.buffers) check_running(a, out, options.residual ? 0.1 : 0.25);
  CHECK_EQUAL(out.batches, is_batch && options.buffers ? 4 : 3);
}

template <class T>
std::pair<Doubles, Doubles> run_channel_stats(const Case<T>& a, const cpu::Threads& threads) {
  std::pair<Doubles, Doubles> out{Doubles(a.layout.channels, NAN), Doubles(a.layout.channels, NAN)};
  ForwardParams p;
  p.layout = a.layout;
  p.dtype = dtype_of<T>;
  p.input = a.input.data();
  p.mean = out.first.data();
  p.var = out.second.data();
  cpu::channel_stats(p, threads);
  return out;
}

template <class T>
void test_channel_stats(const Case<T>& a) {
  const auto stats = same_for_all_threads([&](const cpu::Threads& threads) { return run_channel_stats(a, threads); });
  for (int64_t k = 0; k < a.layout.channels; ++k) {
    CHECK_NEAR(stats.first[k], a.batch.mean[k], arithmetic<T>);
    CHECK_NEAR(stats.second[k], a.var[k], arithmetic<T> * (1 + a.var[k]));
  }
}

}  // namespace fastbn::test
