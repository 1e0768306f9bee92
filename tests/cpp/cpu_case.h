// Tensors and parameters for tests of the CPU backend, and the threads that they run on.
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

inline void run_in_order(int64_t count, int64_t, Task task, void* context) { task(0, count, context); }

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

// What `run` returns for one thread, which more threads, and one with its work in another order, must return as well.
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

// Too near a point where a derivative jumps for arithmetic to tell on which side z lies.
template <class T>
bool is_at_kink(double z) {
  for (double kink : {-3.0, 0.0, 3.0, 6.0})
    if (std::fabs(z - kink) <= arithmetic<T> * (1 + std::fabs(z))) return true;
  return false;
}

// What an op is given besides the input, and whether it is asked for the mask and the statistics.
struct Options {
  bool residual, mask, weight, bias, buffers, stats;
};
inline const Options variants[] = {{false, false, true, true, true, true},
                                   {true, true, false, true, true, true},
                                   {true, false, true, false, false, false},
                                   {false, true, false, false, false, true}};

template <class T>
using Parameter = std::conditional_t<sizeof(T) == 2, float, T>;

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

  // The five elements that a channel's pivot is the median of lie far from all others in some channels, so that half
  // types need their second look there, and only there. float64 has no wider type to take such sums in.
  void move_pivots() {
    for (int64_t c = 1; c < layout.channels && layout.count() >= 100; c += 4)
      for (int i = 0; i < pivot_samples; ++i)
        input.data()[pivot_sample(layout, i) + c * layout.inner] = from_acc<T>(acc_t<T>(30));
  }

  Tensor<uint8_t> new_mask() const { return Tensor<uint8_t>(layout.runs() * layout.mask_bytes_per_run(), shift); }

  // With these options, and the statistics of that source.
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
