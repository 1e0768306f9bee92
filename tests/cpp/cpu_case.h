// Tensors, parameters and threads for the tests of the CPU backend.
#pragma once

#include <numeric>
#include <utility>

#include "check.h"
#include "cpu/launch.h"
#include "kernel_reference.h"
#include "math/pivot.h"

namespace fastbn::test {

constexpr double kEps = 1e-5;

using Task = void (*)(int64_t begin, int64_t end, void* context);

// Runs a task on one thread, items in order.
inline void run_in_order(int64_t count, int64_t, Task task, void* context) { task(0, count, context); }

// Runs a task on one thread, items one by one in random order.
inline void run_shuffled(int64_t count, int64_t, Task task, void* context) {
  static uint64_t state = 1;
  std::vector<int64_t> items(count);
  std::iota(items.begin(), items.end(), 0);
  for (int64_t i = count - 1; i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(items[i], items[int64_t((state >> 33) % uint64_t(i + 1))]);
  }
  for (int64_t item : items) task(item, item + 1, context);
}

// Returns the result of `run` for one thread. Checks that more threads, and items in another order, give the same
// result.
template <class Run>
auto same_for_all_threads(Run&& run) {
  const auto first = run(cpu::Threads{1, run_in_order});
  for (int count : {1, 2, 7}) CHECK(run(cpu::Threads{count, run_shuffled}) == first);
  return first;
}

template <class T>
bool same_bits(const Tensor<T>& a, const Tensor<T>& b) {
  return a.size == b.size && std::memcmp(a.data(), b.data(), a.size * sizeof(T)) == 0;
}

template <class T>
Tensor<T> tensor_of(const Doubles& values, int64_t shift) {
  Tensor<T> tensor(int64_t(values.size()), shift);
  for (int64_t i = 0; i < tensor.size; ++i) tensor.data()[i] = from_acc<T>(acc_t<T>(values[i]));
  return tensor;
}

template <class T>
ChannelVector vector_if(bool wanted, const Tensor<T>& tensor) {
  return wanted ? ChannelVector{tensor.data(), dtype_of<T>} : ChannelVector{};
}

template <class T>
T* pointer_if(bool wanted, const Tensor<T>& tensor) {
  return wanted ? tensor.data() : nullptr;
}

// Returns whether z is so near a jump of a derivative that rounding decides on which side it lies.
template <class T>
bool is_at_kink(double z) {
  for (double kink : {-3.0, 0.0, 3.0, 6.0})
    if (std::fabs(z - kink) <= arithmetic<T> * (1 + std::fabs(z))) return true;
  return false;
}

// The optional inputs of an op, and whether it writes the mask and the statistics.
struct Options {
  bool residual, mask, weight, bias, buffers, stats;
};
inline const Options variants[] = {{false, false, true, true, true, true},
                                   {true, true, false, true, true, true},
                                   {true, false, true, false, false, false},
                                   {false, true, false, false, false, true}};

template <class T>
using Parameter = std::conditional_t<sizeof(T) == 2, float, T>;

// The operands of an op on a tensor of one layout.
template <class T>
struct Case {
  Layout layout;
  int64_t shift;
  Tensor<T> input, residual;
  Channels batch;
  Doubles var, running_mean, running_var;
  Tensor<Parameter<T>> weight, bias;

  Case(const Layout& layout, int64_t shift)
      : layout(layout),
        shift(shift),
        input(random_tensor<T>(layout.numel(), 1, -3, shift)),  // so that a padding 0 would pass for active
        residual(random_tensor<T>(layout.numel(), 2, 0.5, shift)),
        weight(0),
        bias(0) {
    if (sizeof(acc_t<T>) < sizeof(double)) move_pivots();
    reference_stats(layout, input, batch.mean, var);
    for (int64_t c = 0; c < layout.channels; ++c) {
      batch.inv_std.push_back(1 / std::sqrt(var[c] + kEps));
      batch.weight.push_back(1.5 - 0.25 * double(c % 5));
      batch.bias.push_back(0.75 * double(c % 3));
      running_mean.push_back(-2.5);
      running_var.push_back(1.5 + 0.125 * double(c % 4));
    }
    weight = tensor_of<Parameter<T>>(batch.weight, shift);
    bias = tensor_of<Parameter<T>>(batch.bias, shift);
  }

  // Moves the five elements whose median is the pivot far away from all others in every fourth channel, so that the
  // fast sums of half types fail there, and only there. float64 has no wider type for exact sums.
  void move_pivots() {
    for (int64_t c = 1; c < layout.channels && layout.count() >= 100; c += 4)
      for (int i = 0; i < pivot_samples; ++i)
        input.data()[pivot_sample(layout, i) + c * layout.inner] = from_acc<T>(acc_t<T>(30));
  }

  Tensor<uint8_t> new_mask() const { return Tensor<uint8_t>(layout.runs() * layout.mask_bytes_per_run(), shift); }

  // Returns the per-channel numbers for these options and this source of the statistics.
  Channels channels(const Options& options, Statistics statistics) const {
    Channels c = batch;
    for (int64_t k = 0; k < layout.channels; ++k) {
      if (!options.weight) c.weight[k] = 1;
      if (!options.bias) c.bias[k] = 0;
      if (statistics == Statistics::running) c.inv_std[k] = 1 / std::sqrt(running_var[k] + kEps);
      if (statistics == Statistics::given) c.mean[k] += 0.25, c.inv_std[k] *= 0.5;
    }
    if (statistics == Statistics::running) c.mean = running_mean;
    return c;
  }
};

}  // namespace fastbn::test
