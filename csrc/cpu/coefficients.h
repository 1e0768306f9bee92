// Tables of per-channel coefficients for the leaf loops, stored as one array per member. With channels innermost, a
// table has one entry per column: where several rows are packed into one, the channels' entries repeat.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/partition.h"
#include "cpu/workspace.h"
#include "math/affine.h"

namespace fastbn::cpu {

// Calls `visit(chunk)` for consecutive chunks of the channels [begin, end).
template <class Visit>
void for_each_chunk(int64_t begin, int64_t end, Visit&& visit) {
  for (int64_t first = begin; first < end; first += chunk_channels) {
    Chunk chunk;
    chunk.first = first;
    chunk.channels = std::min(chunk_channels, end - first);
    std::fill_n(chunk.mean_rest, chunk.channels, 0.0);
    visit(chunk);
  }
}

// Copies entries [begin, end) of a table to all other columns of the same channels.
template <class A>
void repeat_columns(A* table, const Partition& partition, int64_t begin, int64_t end) {
  for (int64_t j = partition.channels(); j < partition.entries(); j += partition.channels())
    std::copy(table + begin, table + end, table + j + begin);
}

// A set of arrays with one number per channel or column. With two planes, even columns come first and then odd ones, so
// that each register of an interleaved vector of bfloat16 loads from consecutive addresses (load_planes in
// vec_memory.h).
template <class A, int members>
class CoefficientTable {
 public:
  CoefficientTable(const Partition& partition, int column_planes)
      : size_(partition.entries()),
        channels_(partition.channels()),
        shift_(partition.in_columns() ? column_planes - 1 : 0),
        plane_(((size_ + shift_) >> shift_) + table_padding),
        stride_((shift_ + 1) * plane_),
        values_(size_t(members * stride_)) {
    for (int64_t end = plane_; end <= members * stride_; end += plane_)
      std::fill_n(values_.data() + end - table_padding - shift_, table_padding + shift_, A(0));
  }

  void set(const Chunk& chunk, const ChunkCoefficients<A, members>& values) {
    for (int member = 0; member < members; ++member) {
      if (shift_ == 0) {
        std::copy_n(values[member], chunk.channels, &at(member, chunk.first));
        continue;
      }
      for (int64_t plane = 0; plane < std::min<int64_t>(2, chunk.channels); ++plane) {
        A* const target = &at(member, chunk.first + plane);
        const A* const source = values[member] + plane;
        for (int64_t i = 0; 2 * i + plane < chunk.channels; ++i) target[i] = source[2 * i];
      }
    }
  }

  // Copies the entries of channels [begin, end) to all other columns of the same channels.
  void repeat(int64_t begin, int64_t end) {
    for (int member = 0; member < members; ++member)
      for (int64_t j = channels_; j < size_; j += channels_)
        for (int64_t channel = begin; channel < end; ++channel) at(member, j + channel) = at(member, channel);
  }

  // Returns the array of a member from entry `first` on. With two planes, `first` must be 0.
  const A* member(int member, int64_t first) const { return values_.data() + member * stride_ + first; }
  int64_t plane() const { return plane_; }

 private:
  A& at(int member, int64_t column) {
    return values_[size_t(member * stride_ + (column & shift_) * plane_ + (column >> shift_))];
  }

  int64_t size_, channels_, shift_, plane_, stride_;
  Workspace<A> values_;
};

template <class A>
class AffineTable {
 public:
  AffineTable(const Partition& partition, int column_planes) : table_(partition, column_planes) {}

  void set(const Chunk& chunk, const ChunkCoefficients<A, 3>& values) { table_.set(chunk, values); }
  void repeat(int64_t begin, int64_t end) { table_.repeat(begin, end); }
  AffineArrays arrays(int64_t first) const {
    return {table_.member(0, first), table_.member(1, first), table_.member(2, first), table_.plane()};
  }

 private:
  CoefficientTable<A, 3> table_;
};

// Intervals of x on which relu's derivative is 1. The table is empty if `relu_intervals` is null.
class ReluIntervalTable {
 public:
  ReluIntervalTable(const Partition& partition, FindReluIntervals* relu_intervals)
      : partition_(partition), relu_intervals_(relu_intervals) {
    if (!relu_intervals_) return;
    first_.resize(size_t(partition.entries() + table_padding));
    span_.resize(first_.size());
  }

  void set(const Chunk& chunk, const ChunkCoefficients<float, 3>& affine) {
    if (!relu_intervals_) return;
    const size_t first = size_t(chunk.first);
    relu_intervals_({affine[0], affine[1], affine[2]}, chunk.channels, &first_[first], &span_[first]);
  }
  void repeat(int64_t begin, int64_t end) {
    if (!relu_intervals_) return;
    repeat_columns(first_.data(), partition_, begin, end);
    repeat_columns(span_.data(), partition_, begin, end);
  }
  ReluIntervals arrays(int64_t first) const {
    if (!relu_intervals_) return {};
    return {first_.data() + first, span_.data() + first};
  }

 private:
  const Partition& partition_;
  FindReluIntervals* relu_intervals_;
  Workspace<uint16_t> first_, span_;
};

template <class A>
class GradAffineTable {
 public:
  GradAffineTable(const Partition& partition, int column_planes) : table_(partition, column_planes) {}

  void set(const Chunk& chunk, const ChunkCoefficients<A, 5>& values) { table_.set(chunk, values); }
  void repeat(int64_t begin, int64_t end) { table_.repeat(begin, end); }
  AffineArrays pivots(int64_t first) const { return {table_.member(0, first), nullptr, nullptr, table_.plane()}; }
  GradAffineArrays arrays(int64_t first, bool frozen) const {
    return {frozen ? nullptr : table_.member(1, first), table_.member(2, first), table_.member(3, first),
            table_.member(4, first), table_.plane()};
  }

 private:
  CoefficientTable<A, 5> table_;
};

}  // namespace fastbn::cpu
