// Tables of per-channel coefficients, one array a member, as the leaf loops read them: an entry a channel, or where
// blocks are rows, an entry a column, each channel's repeated as often as its column recurs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "math/affine.h"

namespace fastbn::cpu {

// What is made once a channel is made of so many channels at once, in arrays that a core's cache holds and loops that
// compilers vectorise (an estimate).
constexpr int64_t chunk_channels = 64;

// visit(first, count) over [begin, end).
template <class Visit>
void for_each_chunk(int64_t begin, int64_t end, Visit&& visit) {
  for (int64_t first = begin; first < end; first += chunk_channels) visit(first, std::min(chunk_channels, end - first));
}

// Copies entries [begin, end) of a table to where these channels' columns recur.
template <class A>
void repeat_columns(A* table, int64_t size, int64_t begin, int64_t end, int64_t channels) {
  for (int64_t j = channels; j < size; j += channels) std::copy(table + begin, table + end, table + j + begin);
}

template <class A>
class AffineTable {
 public:
  explicit AffineTable(int64_t size) : size_(size), values_(size_t(3 * size)) {}

  void set(int64_t channel, const Affine<A>& affine) {
    values_[size_t(channel)] = affine.pivot;
    values_[size_t(size_ + channel)] = affine.scale;
    values_[size_t(2 * size_ + channel)] = affine.shift;
  }

  void repeat(int64_t begin, int64_t end, int64_t channels) {
    for (int member = 0; member < 3; ++member)
      repeat_columns(values_.data() + member * size_, size_, begin, end, channels);
  }

  AffineArrays arrays(int64_t first) const {
    const A* base = values_.data() + first;
    return {base, base + size_, base + 2 * size_};
  }

 private:
  int64_t size_;
  std::vector<A> values_;
};

template <class A>
class GradAffineTable {
 public:
  explicit GradAffineTable(int64_t size) : size_(size), values_(size_t(5 * size)) {}

  void set(int64_t channel, const GradAffine<A>& grad_affine) {
    values_[size_t(channel)] = grad_affine.pivot;
    values_[size_t(size_ + channel)] = grad_affine.slope;
    values_[size_t(2 * size_ + channel)] = grad_affine.mean_grad;
    values_[size_t(3 * size_ + channel)] = grad_affine.rest;
    values_[size_t(4 * size_ + channel)] = grad_affine.scale;
  }

  void repeat(int64_t begin, int64_t end, int64_t channels) {
    for (int member = 0; member < 5; ++member)
      repeat_columns(values_.data() + member * size_, size_, begin, end, channels);
  }

  GradAffineArrays arrays(int64_t first, bool frozen) const {
    const A* base = values_.data() + first;
    return {base, frozen ? nullptr : base + size_, base + 2 * size_, base + 3 * size_, base + 4 * size_};
  }

 private:
  int64_t size_;
  std::vector<A> values_;
};

}  // namespace fastbn::cpu
