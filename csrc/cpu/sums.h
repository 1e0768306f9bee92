// Sums of a block about a pivot that is an element of the data, in double: one pass, nothing overflows, and what
// cancels is bounded by the pivot's own share in the result. A constant channel has sums of exactly zero.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastbn::cpu::FASTBN_ISA {

// Vectors of float sum into two vectors of double, vectors of double into one.
template <class A>
struct WideSum {
  static constexpr int parts = int(sizeof(double) / sizeof(A));
  Vec<double> part[parts];

  WideSum() = default;
  FASTBN_INLINE explicit WideSum(double value) {
    for (Vec<double>& p : part) p = Vec<double>(value);
  }
  FASTBN_INLINE explicit WideSum(Vec<A> x) {
    if constexpr (parts == 1) {
      part[0] = x;
    } else {
      part[0] = widen(x, 0);
      part[1] = widen(x, 1);
    }
  }

  FASTBN_INLINE void add(const WideSum& other) {
    for (int i = 0; i < parts; ++i) part[i] += other.part[i];
  }
  FASTBN_INLINE double lane(int i) const { return part[i / Vec<double>::lanes].native[i % Vec<double>::lanes]; }
  FASTBN_INLINE double total() const {
    double sum = 0;
    for (int i = 0; i < Vec<A>::lanes; ++i) sum += lane(i);
    return sum;
  }
};

template <class A>
struct ShiftedSums {
  WideSum<A> first{0.0}, second{0.0};

  FASTBN_INLINE void add(Vec<A> x, const WideSum<A>& pivot) {
    const WideSum<A> wide(x);
    for (int i = 0; i < WideSum<A>::parts; ++i) {
      const Vec<double> d = wide.part[i] - pivot.part[i];
      first.part[i] += d;
      second.part[i] += d * d;
    }
  }
};

// An element near the middle of the data: of five, spread over the channel and off its ends, the median. Images are
// often padded, so that a first element alone may lie far from all others.
template <class T>
void pivots(const void* data, const Layout& layout, void* result) {
  using A = acc_t<T>;
  constexpr int samples = 5;
  const T* input = static_cast<const T*>(data);
  for (int64_t c = 0; c < layout.channels; ++c) {
    A sorted[samples];
    int count = 0;
    for (int i = 0; i < samples; ++i) {
      const int64_t element = layout.count() * (2 * i + 1) / (2 * samples);
      const int64_t run = element / layout.inner * layout.channels + c;
      const A value = to_acc(input[run * layout.inner + element % layout.inner]);
      if (value - value != 0) continue;  // about infinity every sum would be NaN
      int at = count++;
      for (; at > 0 && sorted[at - 1] > value; --at) sorted[at] = sorted[at - 1];
      sorted[at] = value;
    }
    static_cast<A*>(result)[c] = count > 0 ? sorted[count / 2] : A(0);
  }
}

template <class T>
Sums channel_sums(const void* data, Block block, const void* pivot_value) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* input = static_cast<const T*>(data) + block.offset;
  const V narrow_pivot(static_cast<const A*>(pivot_value)[0]);
  const WideSum<A> pivot(narrow_pivot);
  ShiftedSums<A> even, odd;
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* row = input + r * block.row_stride;
    int64_t j = 0;
    for (; j + 2 * V::lanes <= block.cols; j += 2 * V::lanes) {
      even.add(load(row + j), pivot);
      odd.add(load(row + j + V::lanes), pivot);
    }
    for (; j + V::lanes <= block.cols; j += V::lanes) even.add(load(row + j), pivot);
    if (j < block.cols) odd.add(load_some(row + j, block.cols - j, narrow_pivot), pivot);
  }
  even.first.add(odd.first);
  even.second.add(odd.second);
  return {even.first.total(), even.second.total()};
}

template <class T>
void column_sums(const void* data, Block block, const void* pivot_values, Sums* sums) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* input = static_cast<const T*>(data) + block.offset;
  const A* pivots = static_cast<const A*>(pivot_values);

  // Two vectors of columns at a time keep their sums in registers.
  auto strip = [&](auto width, int64_t j, int64_t count) FASTBN_INLINE_LAMBDA {
    constexpr int vectors = decltype(width)::value;
    WideSum<A> pivot[vectors];
    ShiftedSums<A> total[vectors];
    for (int k = 0; k < vectors; ++k) pivot[k] = WideSum<A>(load_up_to(pivots + j + k * V::lanes, count));
    for (int64_t r = 0; r < block.rows; ++r)
      for (int k = 0; k < vectors; ++k)
        total[k].add(load_up_to(input + r * block.row_stride + j + k * V::lanes, count), pivot[k]);
    for (int k = 0; k < vectors; ++k)
      for (int64_t i = 0; i < count; ++i)
        sums[j + k * V::lanes + i] = {total[k].first.lane(int(i)), total[k].second.lane(int(i))};
  };

  int64_t j = 0;
  for (; j + 2 * V::lanes <= block.cols; j += 2 * V::lanes) strip(std::integral_constant<int, 2>{}, j, V::lanes);
  for (; j + V::lanes <= block.cols; j += V::lanes) strip(std::integral_constant<int, 1>{}, j, V::lanes);
  if (j < block.cols) strip(std::integral_constant<int, 1>{}, j, block.cols - j);
}

}  // namespace fastbn::cpu::FASTBN_ISA
