// Moments of a block in two passes over cached data: a mean, then sums about it. The first pass sums differences from
// the first element, so that constant data have exactly that mean and no variance.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastbn::cpu::FASTBN_ISA {

// For what float cannot hold: infinities, NaN, squares that overflow.
template <class T>
Moments exact_moments(const T* input, const Block& block, int64_t first_col, int64_t cols) {
  const double count = double(block.rows * cols);
  double sum = 0, m2 = 0;
  for (int64_t r = 0; r < block.rows; ++r)
    for (int64_t j = first_col; j < first_col + cols; ++j) sum += double(to_acc(input[r * block.row_stride + j]));
  const double mean = sum / count;
  for (int64_t r = 0; r < block.rows; ++r)
    for (int64_t j = first_col; j < first_col + cols; ++j) {
      const double d = double(to_acc(input[r * block.row_stride + j])) - mean;
      m2 += d * d;
    }
  return {count, mean, m2};
}

template <class T>
Moments channel_moments(const void* data, Block block) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int unroll = 4;
  const T* input = static_cast<const T*>(data) + block.offset;
  const double count = double(block.rows * block.cols);

  // Calls visit(vector, k) with accumulator index k; what a tail lacks is filled with `fill`.
  auto for_each = [&](V fill, auto&& visit) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const T* row = input + r * block.row_stride;
      int64_t j = 0;
      for (; j + unroll * V::lanes <= block.cols; j += unroll * V::lanes)
        for (int k = 0; k < unroll; ++k) visit(load(row + j + k * V::lanes), k);
      for (int k = 0; j + V::lanes <= block.cols; j += V::lanes, ++k) visit(load(row + j), k);
      if (j < block.cols) visit(load_some(row + j, block.cols - j, fill), unroll - 1);
    }
  };

  const V first(to_acc(input[0]));
  V sum[unroll], squares[unroll];
  for (int k = 0; k < unroll; ++k) sum[k] = V(0);
  for_each(first, [&](V x, int k) { sum[k] += x - first; });
  const double shift = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / count;

  const V pivot(A(double(first.native[0]) + shift));
  for (int k = 0; k < unroll; ++k) sum[k] = squares[k] = V(0);
  for_each(pivot, [&](V x, int k) {
    const V d = x - pivot;
    sum[k] += d;
    squares[k] += d * d;
  });
  const Moments moments = Moments::from_shifted(count, double(pivot.native[0]),
                                                sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])),
                                                sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])));
  return moments.is_finite() ? moments : exact_moments(input, block, 0, block.cols);
}

template <class T>
void column_moments(const void* data, Block block, Moments* moments) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* input = static_cast<const T*>(data) + block.offset;

  auto strip = [&](auto width, int64_t j, auto&& load_vector) {
    constexpr int vectors = decltype(width)::value;
    V pivot[vectors], sum[vectors], squares[vectors];
    for (int k = 0; k < vectors; ++k) {
      pivot[k] = load_vector(input + j + k * V::lanes);
      sum[k] = V(0);
    }
    for (int64_t r = 1; r < block.rows; ++r)
      for (int k = 0; k < vectors; ++k)
        sum[k] += load_vector(input + r * block.row_stride + j + k * V::lanes) - pivot[k];
    for (int k = 0; k < vectors; ++k) {
      pivot[k] += sum[k] * V(1.0 / double(block.rows));
      sum[k] = squares[k] = V(0);
    }
    for (int64_t r = 0; r < block.rows; ++r)
      for (int k = 0; k < vectors; ++k) {
        const V d = load_vector(input + r * block.row_stride + j + k * V::lanes) - pivot[k];
        sum[k] += d;
        squares[k] += d * d;
      }
    for (int k = 0; k < vectors; ++k)
      for (int i = 0; i < V::lanes && j + k * V::lanes + i < block.cols; ++i) {
        const int64_t column = j + k * V::lanes + i;
        Moments result = Moments::from_shifted(double(block.rows), double(pivot[k].native[i]),
                                               double(sum[k].native[i]), double(squares[k].native[i]));
        moments[column] = result.is_finite() ? result : exact_moments(input, block, column, 1);
      }
  };

  int64_t j = 0;
  auto whole = [](const T* source) { return load(source); };
  for (; j + 4 * V::lanes <= block.cols; j += 4 * V::lanes) strip(std::integral_constant<int, 4>{}, j, whole);
  for (; j + V::lanes <= block.cols; j += V::lanes) strip(std::integral_constant<int, 1>{}, j, whole);
  if (j < block.cols) {
    const int64_t rest = block.cols - j;
    strip(std::integral_constant<int, 1>{}, j, [rest](const T* source) { return load_some(source, rest, V(0)); });
  }
}

}  // namespace fastbn::cpu::FASTBN_ISA
