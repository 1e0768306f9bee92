// The kernels of bench/plans.cu itself: random inputs, comparisons, and the definitions in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device/device.cuh"
#include "math/params.h"

namespace fastbn::bench {

// Calls use(i) for the indices below `count` that this thread has.
template <class Use>
FASTBN_DEVICE void for_each_index(int64_t count, Use use) {
  const int64_t threads = device::block_threads(), first = device::block_x() * threads + device::thread_index();
  for (int64_t i = first; i < count; i += device::grid_x() * threads) use(i);
}

FASTBN_DEVICE int64_t thread_of_grid() { return device::block_x() * device::block_threads() + device::thread_index(); }

FASTBN_GLOBAL void read_all(const float* from, int64_t count, float* sink) {
  float seen = 0;
  for_each_index(count / 4, [&](int64_t i) {
    const auto values = device::load16(from + 4 * i);
    seen += values.element[0] + values.element[1] + values.element[2] + values.element[3];
  });
  if (seen == 0.5f) *sink = seen;
}

// Fills a tensor with roughly normal numbers, by a hash of the index.
template <class T>
FASTBN_GLOBAL void fill(T* to, int64_t count, uint64_t seed, float mean) {
  for_each_index(count, [&](int64_t i) {
    uint64_t bits = (i + seed) * 0x9E3779B97F4A7C15ull;
    bits = (bits ^ bits >> 29) * 0xBF58476D1CE4E5B9ull;
    bits ^= bits >> 32;
    float value = mean;
    for (int k = 0; k < 4; ++k) value += float(bits >> 16 * k & 0xffff) / 65536 - 0.5f;
    to[i] = from_acc<T>(value * 1.7f);
  });
}

// Counts, per thread, the elements that differ by more than the rounding of T and of the statistics.
template <class T>
FASTBN_GLOBAL void compare(const T* a, const T* b, int64_t count, int* wrong) {
  constexpr float tolerance = sizeof(T) == 2 ? 1 / 64.0f : 1e-5f;
  int found = 0;
  for_each_index(count, [&](int64_t i) {
    const float x = to_acc(a[i]), y = to_acc(b[i]);
    found += !(fabsf(x - y) <= tolerance * (fabsf(y) + 0.1f));
  });
  wrong[thread_of_grid()] = found;
}

// Counts, per thread, the words that differ.
FASTBN_GLOBAL void compare_bits(const uint16_t* a, const uint16_t* b, int64_t count, int* wrong) {
  int found = 0;
  for_each_index(count, [&](int64_t i) { found += a[i] != b[i]; });
  wrong[thread_of_grid()] = found;
}

// Bounds as in tests/cpp/kernel_reference.h: of arithmetic in float at scale 1, and half a unit in the last place of T.
constexpr double arithmetic = 4e-6;

template <class T>
FASTBN_INLINE double rounding(double value);
template <>
FASTBN_INLINE double rounding<float>(double) {
  return 0;
}
template <>
FASTBN_INLINE double rounding<bfloat16>(double value) {
  return fabs(value) * 0x1p-8;
}
template <>
FASTBN_INLINE double rounding<float16>(double value) {
  return fabs(value) * 0x1p-11 + 0x1p-25;
}

// The definitions in double, element by element. `mean` and `inv_std` are exact in forward, and those given in
// backward.
template <class T>
struct Reference {
  Layout layout;
  Activation activation = Activation::none;
  const T *input = nullptr, *residual = nullptr, *grad_out = nullptr;
  const uint8_t* mask = nullptr;  // stands for the derivative, in backward
  const double *mean = nullptr, *inv_std = nullptr, *weight = nullptr, *bias = nullptr;

  FASTBN_DEVICE int64_t channel_of(int64_t i) const { return i / layout.inner % layout.channels; }

  FASTBN_DEVICE double xhat(int64_t i, int64_t c) const { return (double(to_acc(input[i])) - mean[c]) * inv_std[c]; }

  FASTBN_DEVICE double z(int64_t i, int64_t c) const {
    return xhat(i, c) * weight[c] + bias[c] + (residual ? double(to_acc(residual[i])) : 0);
  }

  FASTBN_DEVICE bool mask_bit(const uint8_t* bits, int64_t i) const {
    return bits[layout.mask_byte(i)] >> (i % layout.run() % 8) & 1;
  }

  // Returns whether rounding decides on which side of relu's kink z lies.
  FASTBN_DEVICE bool is_near_kink(double z) const {
    return activation == Activation::relu && !mask && fabs(z) <= arithmetic * (1 + fabs(z));
  }

  FASTBN_DEVICE double grad_z(int64_t i, double z) const {
    const double grad = double(to_acc(grad_out[i]));
    return mask ? (mask_bit(mask, i) ? grad : 0) : activation_backward(activation, z, grad, 0.0);
  }
};

// Two sums of a channel, the sums of magnitudes, and the magnitudes near a kink, which may be in the sums or not.
struct ChannelSums {
  double sum[2], magnitude[2], uncertain[2];
};
constexpr int sums_per_channel = sizeof(ChannelSums) / sizeof(double);

// Adds up sums of all threads of a block, in shared memory, and gives the total to all.
FASTBN_DEVICE ChannelSums add_up(const ChannelSums& mine) {
  ChannelSums* all = device::shared_memory<ChannelSums>();
  const int thread = device::thread_index();
  device::sync_block();
  all[thread] = mine;
  for (int half = device::block_threads() / 2; half > 0; half /= 2) {
    device::sync_block();
    if (thread < half) {
      for (int k = 0; k < 2; ++k) {
        all[thread].sum[k] += all[thread + half].sum[k];
        all[thread].magnitude[k] += all[thread + half].magnitude[k];
        all[thread].uncertain[k] += all[thread + half].uncertain[k];
      }
    }
  }
  device::sync_block();
  return all[0];
}

// Calls use(i) for the elements of a block's channel that this thread has.
template <class Use>
FASTBN_DEVICE void for_each_of_channel(const Layout& layout, int64_t channel, Use use) {
  for (int64_t k = device::thread_index(); k < layout.count(); k += device::block_threads()) {
    use((k / layout.inner * layout.channels + channel) * layout.inner + k % layout.inner);
  }
}

// A block per channel: mean and biased variance.
template <class T>
FASTBN_GLOBAL void reference_stats(Layout layout, const T* input, double* mean, double* var) {
  const int64_t channel = device::block_x();
  ChannelSums mine = {};
  for_each_of_channel(layout, channel, [&](int64_t i) { mine.sum[0] += double(to_acc(input[i])); });
  const double center = add_up(mine).sum[0] / double(layout.count());
  mine = {};
  for_each_of_channel(layout, channel, [&](int64_t i) {
    const double deviation = double(to_acc(input[i])) - center;
    mine.sum[0] += deviation * deviation;
  });
  const double squares = add_up(mine).sum[0];
  if (device::thread_index() == 0) {
    mean[channel] = center;
    var[channel] = squares / double(layout.count());
  }
}

// A block per channel: the sums of gradients, and with xhat.
template <class T>
FASTBN_GLOBAL void reference_grad_sums(Reference<T> reference, ChannelSums* sums) {
  const int64_t channel = device::block_x();
  ChannelSums mine = {};
  for_each_of_channel(reference.layout, channel, [&](int64_t i) {
    const double z = reference.z(i, channel), grad = reference.grad_z(i, z), xhat = reference.xhat(i, channel);
    const double near = reference.is_near_kink(z) ? fabs(double(to_acc(reference.grad_out[i]))) : 0;
    const double terms[2] = {grad, grad * xhat}, nears[2] = {near, near * fabs(xhat)};
    for (int k = 0; k < 2; ++k) {
      mine.sum[k] += terms[k];
      mine.magnitude[k] += fabs(terms[k]);
      mine.uncertain[k] += nears[k];
    }
  });
  const ChannelSums total = add_up(mine);
  if (device::thread_index() == 0) sums[channel] = total;
}

// Counts, per thread, the wrong elements of an output, and wrong bits of its mask.
template <class T>
FASTBN_GLOBAL void check_output(Reference<T> reference, const T* output, const uint8_t* mask, int* wrong) {
  int found = 0;
  for_each_index(reference.layout.numel(), [&](int64_t i) {
    const double z = reference.z(i, reference.channel_of(i));
    const double y = activation_forward(reference.activation, z, 0.0);
    const double bound = arithmetic * (1 + fabs(z));
    found += !(fabs(double(to_acc(output[i])) - y) <= rounding<T>(y) + bound);
    found += mask && fabs(z) > bound && reference.mask_bit(mask, i) != activation_is_upper(reference.activation, z);
  });
  wrong[thread_of_grid()] = found;
}

// Counts, per thread, the wrong elements of the gradients of the input, and of the residual unless that is null.
template <class T>
FASTBN_GLOBAL void check_gradients(Reference<T> reference, const ChannelSums* sums, const T* grad_input,
                                   const T* grad_residual, int* wrong) {
  int found = 0;
  for_each_index(reference.layout.numel(), [&](int64_t i) {
    const int64_t c = reference.channel_of(i);
    const double z = reference.z(i, c), n = double(reference.layout.count());
    if (reference.is_near_kink(z)) return;
    const double grad_z = reference.grad_z(i, z);
    const double scale = reference.weight[c] * reference.inv_std[c];
    const double grad = scale * (grad_z - sums[c].sum[0] / n - reference.xhat(i, c) * sums[c].sum[1] / n);
    const double slack = (sums[c].uncertain[0] + fabs(reference.xhat(i, c)) * sums[c].uncertain[1]) / n;
    const double bound = arithmetic * 10 * fmax(1.0, reference.inv_std[c]) + fabs(scale) * slack;
    found += !(fabs(double(to_acc(grad_input[i])) - grad) <= rounding<T>(grad) + bound);
    if (grad_residual) found += !(fabs(double(to_acc(grad_residual[i])) - grad_z) <= rounding<T>(grad_z) + bound);
  });
  wrong[thread_of_grid()] = found;
}

}  // namespace fastbn::bench
