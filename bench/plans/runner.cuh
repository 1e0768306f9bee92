// Runs ops by given plans: their inputs, their times, and whether their results are right.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "cases.h"
#include "cuda/launch.h"
#include "kernels.cuh"
#include "plan/planner.h"

namespace fastbn::bench {

#define FASTBN_CHECK(call)                                                                   \
  do {                                                                                       \
    if (const cudaError_t error = call; error != cudaSuccess) {                              \
      std::fprintf(stderr, "line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error)); \
      std::fflush(nullptr);                                                                  \
      _exit(1);                                                                              \
    }                                                                                        \
  } while (false)

// Elements, channel vectors and bits that are not as they should be.
struct Mistakes {
  int64_t two_phase = 0;  // that differ from the result in two phases
  int64_t reference = 0;  // from the definitions in double
  int64_t channels = 0;   // per channel, from the same
  int64_t unstable = 0;   // that differ from the first of two runs

  int64_t total() const { return two_phase + reference + channels + unstable; }
};

template <class T>
class Runner {
 public:
  // Allocates for tensors of up to `max_numel` elements and `max_channels` channels.
  Runner(const DeviceLimits& limits, int64_t max_numel, int64_t max_channels)
      : limits_(limits), numel_((max_numel + 7) / 8 * 8), max_channels_(max_channels) {
    for (T** tensor : {&input_, &residual_, &grad_out_, &result_, &again_, &expected_, &grad_residual_})
      FASTBN_CHECK(cudaMalloc(tensor, numel_ * sizeof(T)));
    FASTBN_CHECK(cudaMalloc(&mask_, numel_ / 8));
    FASTBN_CHECK(cudaMalloc(&result_mask_, numel_ / 8));
    FASTBN_CHECK(cudaMalloc(&vectors_, vector_count * max_channels * sizeof(double)));
    FASTBN_CHECK(cudaMalloc(&sums_, max_channels * sizeof(ChannelSums)));
    FASTBN_CHECK(cudaMalloc(&workspace_, workspace_bytes));
    FASTBN_CHECK(cudaMalloc(&counts_, max_blocks * block * sizeof(int)));
    FASTBN_CHECK(cudaMalloc(&flush_, flush_bytes()));
    FASTBN_CHECK(cudaStreamCreate(&stream_));
    FASTBN_CHECK(cudaMemsetAsync(flush_, 0, flush_bytes(), stream_));
    for (int i = 0; i < samples; ++i) {
      FASTBN_CHECK(cudaEventCreate(&begin_[i]));
      FASTBN_CHECK(cudaEventCreate(&end_[i]));
    }
    uint64_t seed = 0;
    for (T* tensor : {input_, residual_, grad_out_}) run(&fill<T>, numel_, tensor, numel_, seed += 1 << 20, 0.3f);
  }

  // Sets the op whose plans run next, and computes its result in two phases.
  void set(const Op& op, const Plan& two_phase) {
    op_ = op;
    set_params();
    reset_vectors();
    if (op.backward()) {  // its statistics and mask
      Op first = op;
      first.direction = Direction::forward;
      forward_.output = result_;
      forward_.mask = op.masked() ? mask_ : nullptr;
      const Plan plan = choose_two_phase(planned_request(first.request()), limits_);
      FASTBN_CHECK(cuda::forward(forward_, plan, workspace_, stream_));
    }
    FASTBN_CHECK(run(two_phase, expected_));
  }

  bool fits(const Plan& plan) const { return cuda::workspace_bytes(plan, backward_) <= workspace_bytes; }

  cudaError_t run(const Plan& plan) { return run(plan, result_); }

  // Counts the elements that differ from the result in two phases.
  int64_t compare_once(const Plan& plan) {
    poison(result_);
    FASTBN_CHECK(run(plan, result_));
    return count_of(op_.layout.numel(), &compare<T>, result_, expected_, op_.layout.numel());
  }

  // Runs a plan twice, the second time with what the first left in the workspace, and compares all of its results.
  Mistakes check(const Plan& plan) {
    const int64_t numel = op_.layout.numel();
    Mistakes mistakes;
    FASTBN_CHECK(cudaMemsetAsync(workspace_, 0xff, cuda::workspace_bytes(plan, backward_), stream_));
    for (T* to : {again_, result_}) {
      poison(to);
      poison(grad_residual_);
      FASTBN_CHECK(cudaMemsetAsync(result_mask_, 0x55, (numel + 7) / 8, stream_));
      if (!op_.backward()) reset_vectors();
      FASTBN_CHECK(run(plan, to));
    }
    mistakes.unstable = count_of(numel, &compare_bits, reinterpret_cast<const uint16_t*>(again_),
                                 reinterpret_cast<const uint16_t*>(result_), numel * int64_t(sizeof(T) / 2));
    mistakes.two_phase = count_of(numel, &compare<T>, result_, expected_, numel);
    op_.backward() ? check_backward(mistakes) : check_forward(mistakes);
    return mistakes;
  }

  // Returns the median and the minimum time of a call, in microseconds.
  template <class Run>
  std::pair<double, double> time(Run call) {
    for (int i = 0; i < samples; ++i) {
      run(&read_all, flush_bytes() / 4, static_cast<const float*>(flush_), flush_bytes() / 4, flush_);
      FASTBN_CHECK(cudaEventRecord(begin_[i], stream_));
      FASTBN_CHECK(call());
      FASTBN_CHECK(cudaEventRecord(end_[i], stream_));
    }
    FASTBN_CHECK(cudaStreamSynchronize(stream_));
    float ms[samples];
    for (int i = 0; i < samples; ++i) FASTBN_CHECK(cudaEventElapsedTime(ms + i, begin_[i], end_[i]));
    std::sort(ms, ms + samples);
    return {1e3 * ms[samples / 2], 1e3 * ms[0]};
  }

  double copy_us(const Layout& layout) {
    return time([&] {
             return cudaMemcpyAsync(result_, input_, layout.numel() * sizeof(T), cudaMemcpyDeviceToDevice, stream_);
           })
        .first;
  }

  void wait() { FASTBN_CHECK(cudaStreamSynchronize(stream_)); }

 private:
  static constexpr int samples = 7, block = 256, max_blocks = 1024;
  static constexpr int64_t workspace_bytes = int64_t(256) << 20;
  enum Vector { mean, inv_std, weight, bias, running_mean, running_var, grad_weight, grad_bias, exact_mean, exact_var };
  static constexpr int vector_count = exact_var + 1;

  // Reads more than L2 holds.
  int64_t flush_bytes() const { return limits_.l2_bytes * 8 / 3 / 16 * 16; }

  double* vector(Vector which) const { return vectors_ + which * max_channels_; }
  ChannelVector channel_vector(Vector which) const { return {vector(which), DType::float64}; }

  static int64_t blocks_for(int64_t indices) {
    return std::clamp<int64_t>((indices + block - 1) / block, 1, max_blocks);
  }

  // Launches a kernel with a thread per index, or fewer that take turns.
  template <class... P>
  void run(void (*kernel)(P...), int64_t indices, std::type_identity_t<P>... params) {
    FASTBN_CHECK(device::launch(kernel, {blocks_for(indices), block}, stream_, params...));
  }

  cudaError_t run(const Plan& plan, T* to) {
    forward_.output = backward_.grad_input = to;
    return op_.backward() ? cuda::backward(backward_, plan, workspace_, stream_)
                          : cuda::forward(forward_, plan, workspace_, stream_);
  }

  void poison(T* tensor) { FASTBN_CHECK(cudaMemsetAsync(tensor, 0xff, op_.layout.numel() * sizeof(T), stream_)); }

  // Runs a kernel that counts something per thread, its last argument, and returns the sum.
  template <class... P, class... A>
  int64_t count_of(int64_t indices, void (*kernel)(P...), A... arguments) {
    run(kernel, indices, arguments..., counts_);
    host_counts_.resize(blocks_for(indices) * block);
    read(counts_, host_counts_);
    return std::accumulate(host_counts_.begin(), host_counts_.end(), int64_t(0));
  }

  template <class V>
  void read(const V* from, std::vector<V>& to) {
    FASTBN_CHECK(cudaMemcpyAsync(to.data(), from, to.size() * sizeof(V), cudaMemcpyDeviceToHost, stream_));
    FASTBN_CHECK(cudaStreamSynchronize(stream_));
  }

  void reset_vectors() {
    host_vectors_.assign(vector_count * max_channels_, 0);
    for (int64_t c = 0; c < max_channels_; ++c) {
      host_vectors_[weight * max_channels_ + c] = 1.5 - 0.25 * double(c % 5);
      host_vectors_[bias * max_channels_ + c] = 0.75 * double(c % 3) - 0.5;
      host_vectors_[running_mean * max_channels_ + c] = -2.5;
      host_vectors_[running_var * max_channels_ + c] = 1.5 + 0.125 * double(c % 4);
    }
    FASTBN_CHECK(cudaMemcpyAsync(vectors_, host_vectors_.data(), host_vectors_.size() * sizeof(double),
                                 cudaMemcpyHostToDevice, stream_));
  }

  void set_params() {
    forward_ = {};
    forward_.layout = op_.layout;
    forward_.dtype = op_.dtype;
    forward_.activation = op_.activation();
    forward_.input = input_;
    forward_.residual = op_.adds() ? residual_ : nullptr;
    forward_.mask = op_.masked() ? result_mask_ : nullptr;
    forward_.mean = vector(mean);
    forward_.inv_std = vector(inv_std);
    forward_.weight = channel_vector(weight);
    forward_.bias = channel_vector(bias);
    forward_.running_mean = channel_vector(running_mean);
    forward_.running_var = channel_vector(running_var);
    forward_.momentum = momentum;
    forward_.eps = eps;
    backward_ = {};
    backward_.layout = op_.layout;
    backward_.dtype = op_.dtype;
    backward_.activation = op_.activation();
    backward_.grad_out = grad_out_;
    backward_.input = input_;
    backward_.residual = op_.adds() && !op_.masked() ? residual_ : nullptr;
    backward_.mask = op_.masked() ? mask_ : nullptr;
    backward_.weight = forward_.weight;
    backward_.bias = forward_.bias;
    backward_.mean = forward_.mean;
    backward_.inv_std = forward_.inv_std;
    backward_.grad_residual = op_.adds() ? grad_residual_ : nullptr;
    backward_.grad_weight = channel_vector(grad_weight);
    backward_.grad_bias = channel_vector(grad_bias);
  }

  Reference<T> reference() const {
    Reference<T> reference;
    reference.layout = op_.layout;
    reference.activation = op_.activation();
    reference.input = input_;
    reference.residual = op_.adds() ? residual_ : nullptr;
    reference.grad_out = grad_out_;
    reference.mask = backward_.mask && op_.backward() ? mask_ : nullptr;
    reference.mean = vector(mean);
    reference.inv_std = vector(inv_std);
    reference.weight = vector(weight);
    reference.bias = vector(bias);
    return reference;
  }

  // Launches a kernel with a block per channel.
  template <class... P>
  void run_per_channel(void (*kernel)(P...), std::type_identity_t<P>... params) {
    device::Launch shape{op_.layout.channels, block, int64_t(block * sizeof(ChannelSums))};
    FASTBN_CHECK(device::launch(kernel, shape, stream_, params...));
  }

  void check_forward(Mistakes& mistakes) {
    const int64_t channels = op_.layout.channels, n = op_.layout.count();
    run_per_channel(&reference_stats<T>, op_.layout, input_, vector(exact_mean), vector(exact_var));
    std::vector<double> found(vector_count * max_channels_);
    read(vectors_, found);
    std::vector<double> exact_inv_std(channels);
    const auto is_near = [](double a, double b, double scale) { return std::fabs(a - b) <= arithmetic * scale; };
    for (int64_t c = 0; c < channels; ++c) {
      const auto at = [&](Vector which) { return found[which * max_channels_ + c]; };
      const auto before = [&](Vector which) { return host_vectors_[which * max_channels_ + c]; };
      exact_inv_std[c] = 1 / std::sqrt(at(exact_var) + eps);
      const double unbiased = at(exact_var) * double(n) / double(n - 1);
      const double next_mean = before(running_mean) + momentum * (at(exact_mean) - before(running_mean));
      const double next_var = before(running_var) + momentum * (unbiased - before(running_var));
      mistakes.channels += !is_near(at(mean), at(exact_mean), 1) + !is_near(at(running_mean), next_mean, 1) +
                           !is_near(at(inv_std), exact_inv_std[c], exact_inv_std[c]) +
                           !is_near(at(running_var), next_var, 1);
    }
    Reference<T> exact = reference();
    exact.mean = vector(exact_mean);
    exact.inv_std = vector(exact_var);  // now its inverse root
    FASTBN_CHECK(cudaMemcpyAsync(vector(exact_var), exact_inv_std.data(), channels * sizeof(double),
                                 cudaMemcpyHostToDevice, stream_));
    mistakes.reference = count_of(op_.layout.numel(), &check_output<T>, exact, result_, forward_.mask);
  }

  void check_backward(Mistakes& mistakes) {
    run_per_channel(&reference_grad_sums<T>, reference(), sums_);
    std::vector<ChannelSums> sums(op_.layout.channels);
    read(sums_, sums);
    std::vector<double> found(vector_count * max_channels_);
    read(vectors_, found);
    for (int64_t c = 0; c < op_.layout.channels; ++c) {
      const double totals[2] = {found[grad_bias * max_channels_ + c], found[grad_weight * max_channels_ + c]};
      for (int k = 0; k < 2; ++k) {
        const double bound = arithmetic * (1 + sums[c].magnitude[k]) + sums[c].uncertain[k];
        mistakes.channels += !(std::fabs(totals[k] - sums[c].sum[k]) <= bound);
      }
    }
    mistakes.reference = count_of(op_.layout.numel(), &check_gradients<T>, reference(), sums_, result_,
                                  static_cast<const T*>(op_.adds() ? grad_residual_ : nullptr));
  }

  static constexpr double momentum = 0.1, eps = 1e-5;
  DeviceLimits limits_;
  int64_t numel_, max_channels_;
  Op op_{};
  ForwardParams forward_;
  BackwardParams backward_;
  T *input_, *residual_, *grad_out_, *result_, *again_, *expected_, *grad_residual_;
  uint8_t *mask_, *result_mask_;
  double* vectors_;
  std::vector<double> host_vectors_;
  ChannelSums* sums_;
  void* workspace_;
  int* counts_;
  std::vector<int> host_counts_;
  float* flush_;
  cudaStream_t stream_;
  cudaEvent_t begin_[samples], end_[samples];
};

}  // namespace fastbn::bench
