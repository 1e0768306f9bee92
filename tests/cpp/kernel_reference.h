// Tensors of T, and the expected results of kernels, from the definitions in double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "math/params.h"

namespace fastbn::test {

using Doubles = std::vector<double>;

template <class T>
constexpr DType dtype_of = DType::float32;
template <>
constexpr DType dtype_of<double> = DType::float64;
template <>
constexpr DType dtype_of<bfloat16> = DType::bfloat16;
template <>
constexpr DType dtype_of<float16> = DType::float16;

// A bound on the error of arithmetic in acc_t<T> at scale 1: some tens of roundings, or an exp of a rounded argument.
template <class T>
constexpr double arithmetic = sizeof(acc_t<T>) == 8 ? 1e-13 : 4e-6;

// Returns half a unit in the last place of T, with float16's subnormals.
template <class T>
double rounding(double value) {
  if (dtype_of<T> == DType::bfloat16) return std::fabs(value) * 0x1p-8;
  if (dtype_of<T> == DType::float16) return std::fabs(value) * 0x1p-11 + 0x1p-25;
  return 0;
}

inline ChannelVector vector_of(Doubles& values) { return {values.data(), DType::float64}; }

// The `shift` that places the last element before an inaccessible page. AddressSanitizer does not check accesses by
// intrinsics, such as masked loads; the processor does.
constexpr int64_t before_guard = -1;

// Allocates memory that ends at an inaccessible page.
template <class T>
std::shared_ptr<T> allocate_before_guard(int64_t size) {
  const int64_t page = sysconf(_SC_PAGESIZE), bytes = (size * int64_t(sizeof(T)) + page - 1) / page * page;
  void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* guard = static_cast<char*>(memory) + bytes;
  if (memory == MAP_FAILED || mprotect(guard, page, PROT_NONE) != 0) throw std::bad_alloc();
  return {reinterpret_cast<T*>(guard) - size, [=](T*) { munmap(memory, bytes + page); }};
}

// A tensor whose allocation has exactly its elements, so that AddressSanitizer finds overruns, and is `shift` elements
// off 16-byte alignment.
template <class T>
struct Tensor {
  std::shared_ptr<T> memory;  // copies share it
  int64_t size;
  int64_t shift;

  explicit Tensor(int64_t size, int64_t shift = 0) : size(size), shift(std::max<int64_t>(shift, 0)) {
    if (shift == before_guard)
      memory = allocate_before_guard<T>(size);
    else
      memory = std::shared_ptr<T>(new T[size + shift], std::default_delete<T[]>());
    std::memset(static_cast<void*>(memory.get()), 0xff, (size + this->shift) * sizeof(T));
  }

  T* data() const { return memory.get() + shift; }
  double at(int64_t i) const { return double(to_acc(data()[i])); }
};

// Returns a nearly normal number: a sum of twelve uniform ones.
inline double random_normal(uint64_t& state) {
  double sum = -6;
  for (int i = 0; i < 12; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += double(state >> 40) / double(1 << 24);
  }
  return sum;
}

template <class T>
Tensor<T> random_tensor(int64_t size, uint64_t seed, double mean, int64_t shift = 0) {
  Tensor<T> tensor(size, shift);
  uint64_t state = seed;
  for (int64_t i = 0; i < size; ++i) tensor.data()[i] = from_acc<T>(acc_t<T>(mean + random_normal(state)));
  return tensor;
}

inline int64_t channel_of(const Layout& layout, int64_t i) { return i / layout.inner % layout.channels; }

// Returns the bit of element i in the mask.
inline bool mask_bit(const Layout& layout, const uint8_t* mask, int64_t i) {
  const int64_t run = i / layout.run();
  const int64_t index = i % layout.run();
  return mask[run * layout.mask_bytes_per_run() + index / 8] >> (index % 8) & 1;
}

// Computes mean and biased variance per channel.
template <class T>
void reference_stats(const Layout& layout, const Tensor<T>& input, Doubles& mean, Doubles& var) {
  mean.assign(layout.channels, 0);
  var.assign(layout.channels, 0);
  const double count = double(layout.count());
  for (int64_t i = 0; i < layout.numel(); ++i) mean[channel_of(layout, i)] += input.at(i) / count;
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const double d = input.at(i) - mean[channel_of(layout, i)];
    var[channel_of(layout, i)] += d * d / count;
  }
}

// The per-channel numbers of a normalisation.
struct Channels {
  Doubles mean, inv_std, weight, bias;
};

// Returns z, the input of the activation.
template <class T>
double reference_z(const Layout& layout, const Channels& c, const Tensor<T>& input, const Tensor<T>* residual,
                   int64_t i) {
  const int64_t k = channel_of(layout, i);
  const double z = (input.at(i) - c.mean[k]) * c.inv_std[k] * c.weight[k] + c.bias[k];
  return residual ? z + residual->at(i) : z;
}

// grad_z, its sums per channel, and the sums of absolute values that bound their error.
struct Gradients {
  Doubles z, sum, sum_xhat, absolute_sum, absolute_sum_xhat;
};

// The parameter that tests give an activation: not torch's default.
inline double param_of(Activation activation) { return 1.5 * default_param_of(activation); }

template <class T>
Gradients reference_gradients(const Layout& layout, const Channels& c, Activation activation, const Tensor<T>& grad_out,
                              const Tensor<T>& input, const Tensor<T>* residual) {
  Gradients g;
  for (Doubles* sums : {&g.sum, &g.sum_xhat, &g.absolute_sum, &g.absolute_sum_xhat}) sums->assign(layout.channels, 0);
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const int64_t k = channel_of(layout, i);
    const double z = activation_backward(activation, reference_z(layout, c, input, residual, i), grad_out.at(i),
                                         param_of(activation));
    const double xhat = (input.at(i) - c.mean[k]) * c.inv_std[k];
    g.z.push_back(z);
    g.sum[k] += z;
    g.sum_xhat[k] += z * xhat;
    g.absolute_sum[k] += std::fabs(z);
    g.absolute_sum_xhat[k] += std::fabs(z * xhat);
  }
  return g;
}

}  // namespace fastbn::test
