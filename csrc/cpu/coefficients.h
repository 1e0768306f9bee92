// Tables of per-channel coefficients, one array a member, as the leaf loops read them: an entry a channel, or where
// blocks are rows, an entry a column, each channel's repeated as often as its column recurs.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "math/affine.h"

namespace fastbn::cpu {

template <class A>
class AffineTable {
 public:
  explicit AffineTable(int64_t size) : size_(size), values_(size_t(3 * size)) {}

  void set(int64_t channel, int64_t channels, const Affine<A>& affine) {
    for (int64_t j = channel; j < size_; j += channels) {
      values_[size_t(j)] = affine.pivot;
      values_[size_t(size_ + j)] = affine.scale;
      values_[size_t(2 * size_ + j)] = affine.shift;
    }
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

  void set(int64_t channel, int64_t channels, const GradAffine<A>& grad_affine) {
    for (int64_t j = channel; j < size_; j += channels) {
      values_[size_t(j)] = grad_affine.pivot;
      values_[size_t(size_ + j)] = grad_affine.slope;
      values_[size_t(2 * size_ + j)] = grad_affine.mean_grad;
      values_[size_t(3 * size_ + j)] = grad_affine.rest;
      values_[size_t(4 * size_ + j)] = grad_affine.scale;
    }
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
