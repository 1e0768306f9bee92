// Sums of a tile about a pivot. The fast loops add up a few terms per lane in float, if that is accurate enough, before
// they add to double; the exact ones (phases.h) do not. The sums of a constant channel are exactly zero.
#pragma once

#include <new>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/loops.h"
#include "cpu/kernels/short_rows.h"
#include "cpu/simd/vec_memory.h"
#include "math/moments.h"
#include "math/pivot.h"

namespace fastbn::cpu::FASTBN_ISA {

// A vector of A converted to double: two vectors for float, one for double.
template <class A>
struct WideVec {
  static constexpr int halves = int(sizeof(double) / sizeof(A));
  Vec<double> half[halves];

  WideVec() = default;
  FASTBN_INLINE explicit WideVec(const Vec<A>& x) {
    if constexpr (std::is_same_v<A, double>) {
      half[0] = x;
    } else {
      half[0] = widen(x, 0);
      half[1] = widen(x, 1);
    }
  }

  FASTBN_INLINE WideVec& operator+=(const WideVec& other) {
    for (int i = 0; i < halves; ++i) half[i] += other.half[i];
    return *this;
  }
  FASTBN_INLINE double total() const {
    Vec<double> sum = half[0];
    for (int i = 1; i < halves; ++i) sum += half[i];
    double lane[Vec<double>::lanes];
    store(lane, sum);
    for (int step = Vec<double>::lanes / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
    return lane[0];
  }
};

// The two sums per lane in A, over at most `max_terms` terms. Each addition has a relative rounding error of 2^-24, or
// 2^-53 if A is double.
template <class A, int64_t limit>
struct LaneSums {
  static constexpr int64_t max_terms = limit;
  using Value = Vec<A>;
  Vec<A> first{A(0)}, second{A(0)};

  template <class T, class Source, template <class> class Lanes>
  static FASTBN_INLINE Value load_value(const Source* source, Lanes<T> lanes) {
    return load(source, lanes);
  }
  FASTBN_INLINE void add_shifted(const Value& x, const Value& pivot) {
    const Value d = x - pivot;
    first += d;
    second = second + d * d;
  }
  template <class T>
  FASTBN_INLINE void add_weighted(const Value& term, const Value& weight) {
    first += term;
    second = second + term * weight;
  }
  FASTBN_INLINE void join(const LaneSums& other) {
    first += other.first;
    second += other.second;
  }
};

// The two sums per lane in double, over any number of terms and always in memory order.
template <class A>
struct WideSums {
  static constexpr int64_t max_terms = int64_t(1) << 48;
  using Value = WideVec<A>;
  WideVec<A> first{Vec<A>(A(0))}, second{Vec<A>(A(0))};

  template <class T, class Source, template <class> class Lanes>
  static FASTBN_INLINE Value load_value(const Source* source, Lanes<T> lanes) {
    if constexpr (std::is_same_v<Source, float> && std::is_same_v<Lanes<T>, AllLanes<float>>) {
      // Converting from memory is cheaper than from a register.
      Value value;
      for (int i = 0; i < 2; ++i) value.half[i] = load_as_double(source + i * Vec<double>::lanes);
      return value;
    } else {
      return Value(from_order_of<T>(load(source, lanes)));
    }
  }
  FASTBN_INLINE void add_shifted(const Value& x, const Value& pivot) {
    for (int i = 0; i < Value::halves; ++i) {
      const Vec<double> d = x.half[i] - pivot.half[i];
      first.half[i] += d;
      second.half[i] = second.half[i] + d * d;
    }
  }
  template <class T>
  FASTBN_INLINE void add_weighted(const Vec<A>& term, const Vec<A>& weight) {
    const Value wide(from_order_of<T>(term)), wide_weight(from_order_of<T>(weight));
    for (int i = 0; i < Value::halves; ++i) {
      first.half[i] += wide.half[i];
      second.half[i] = second.half[i] + wide.half[i] * wide_weight.half[i];
    }
  }
  FASTBN_INLINE void join(const WideSums& other) {
    first += other.first;
    second += other.second;
  }
  template <int64_t limit>
  FASTBN_INLINE void join(const LaneSums<A, limit>& other) {
    first += Value(other.first);
    second += Value(other.second);
  }
  FASTBN_INLINE WideVec<A> first_total() const { return first; }
  FASTBN_INLINE WideVec<A> second_total() const { return second; }
};

// The same sums for float64 elements, with their rounding errors: those of equal terms, such as a constant gradient's,
// have one sign, and without this they made 70 ulp of 64x3x28x28 in channels_last.
template <>
struct WideSums<double> {
  Vec<double> first{0.0}, second{0.0}, first_rest{0.0}, second_rest{0.0};

  FASTBN_INLINE void join(const WideSums& other) {
    add(first, first_rest, other.first);
    add(second, second_rest, other.second);
    first_rest += other.first_rest;
    second_rest += other.second_rest;
  }
  template <int64_t limit>
  FASTBN_INLINE void join(const LaneSums<double, limit>& other) {
    add(first, first_rest, other.first);
    add(second, second_rest, other.second);
  }
  FASTBN_INLINE WideVec<double> first_total() const { return total(first, first_rest); }
  FASTBN_INLINE WideVec<double> second_total() const { return total(second, second_rest); }

 private:
  static FASTBN_INLINE void add(Vec<double>& sum, Vec<double>& rest, const Vec<double>& term) {
    const Vec<double> next = sum + term;
    rest += rest_of_sum(sum, term, next);
    sum = next;
  }
  static FASTBN_INLINE WideVec<double> total(const Vec<double>& sum, const Vec<double>& rest) {
    return WideVec<double>(select(rest >= rest, sum + rest, sum));
  }
};

// The types that fast loops accumulate in. Squares of differences do not cancel, so float rounding averages out, and in
// a mean it is relative to the standard deviation. Gradients and their products do cancel, and the remaining sum is
// held to 2 ulp. With float sums bfloat16 stays within that (median 0.5 ulp, maximum 1.5 over 150 tensors of 8
// channels; stock's median is 1.7 to 11). float32 does not (0.8 and 3.9; stock's maximum is 2.5), not even in groups of
// two terms if a channel is alone (tests/numerics: 4.8). A double sum as long as a tile has rounding that is visible in
// float64 results; sums of eight terms, added up with their rounding errors over a strip of rows or a run, do not.
template <class T>
using DoubleTerms = std::conditional_t<std::is_same_v<T, double>, LaneSums<double, 8>, WideSums<acc_t<T>>>;
template <class T>
using Terms = std::conditional_t<std::is_same_v<T, double>, DoubleTerms<T>, LaneSums<float, 16>>;
template <class T>
using GradTerms = std::conditional_t<std::is_same_v<T, bfloat16>, LaneSums<float, 8>, DoubleTerms<T>>;

// Returns the sums with their lanes in memory order.
template <class T, class A, int64_t limit>
FASTBN_INLINE LaneSums<A, limit> in_memory_order(const LaneSums<A, limit>& sums) {
  return {from_order_of<T>(sums.first), from_order_of<T>(sums.second)};
}
template <class T>
FASTBN_INLINE const WideSums<acc_t<T>>& in_memory_order(const WideSums<acc_t<T>>& sums) {
  return sums;
}

// Adds each lane to the sum of its column.
template <class A>
FASTBN_INLINE void add_columns(double* sums, const WideVec<A>& wide) {
  constexpr int step = Vec<double>::lanes;
  for (int i = 0; i < WideVec<A>::halves; ++i)
    store(sums + i * step, load(sums + i * step, AllLanes<double>{}) + wide.half[i]);
}
template <class A>
__attribute__((noinline)) void add_some_columns(double* sums, const WideVec<A>& wide, int64_t first, int64_t end) {
  double lane[Vec<A>::lanes];
  for (int i = 0; i < WideVec<A>::halves; ++i) store(lane + i * Vec<double>::lanes, wide.half[i]);
  for (int64_t i = first; i < end; ++i) sums[i] += lane[i];
}

// Adds the sums of the vector at `column` to those of a row's columns, except for lanes that the vector before has
// visited, and for those beyond the row.
template <class A>
FASTBN_INLINE void add_columns(ColumnSums sums, int64_t column, int64_t cols, const WideSums<A>& terms) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const int64_t first = -column & (lanes - 1), end = std::min(lanes, cols - column);
  if (end - first == lanes) {
    add_columns(sums.first + column, terms.first_total());
    add_columns(sums.second + column, terms.second_total());
  } else {
    add_some_columns(sums.first + column, terms.first_total(), first, end);
    add_some_columns(sums.second + column, terms.second_total(), first, end);
  }
}

// Returns the sums of a tile of one channel, per lane. `add(terms, row, column, lanes)` adds the terms of a vector.
template <class T, class Terms, class Add>
FASTBN_INLINE WideSums<acc_t<T>> sum_channel(const Tile& tile, Add&& add) {
  using A = acc_t<T>;
  // Each addition depends on the one before, so four registers per sum take turns; half of all registers are left for
  // the operands.
  constexpr int chains = std::min<int>(4 / parts, register_count / 2 * register_bytes / int(sizeof(Terms)));
  WideSums<A> total;
  Terms terms[chains];
  auto flush = [&]() FASTBN_INLINE_LAMBDA {
    for (int step = chains / 2; step > 0; step /= 2)
      for (int chain = 0; chain < step; ++chain) terms[chain].join(terms[chain + step]);
    total.join(terms[0]);
    for (Terms& chain : terms) chain = {};
  };
  for_each_batch<T, chains, Terms::max_terms>(
      tile,
      [&](int chain, int64_t row, int64_t column, auto lanes)
          FASTBN_INLINE_LAMBDA { add(terms[chain], row, column, lanes); },
      flush);
  return total;
}

// Adds the sums of a tile's channels to `sums`. `sum(channel, first row, part)` returns those of part of a channel, per
// lane. Channels are processed side by side, a few rows at a time, which is nearly memory order. Short rows come no
// more at a time than can be padded.
template <class T, class Sum>
FASTBN_INLINE void sum_channels(const Tile& tile, ColumnSums sums, Sum&& sum) {
  using A = acc_t<T>;
  union Total {
    WideSums<A> sums;
    Total() {}  // leaves it uninitialised
  } total[max_tile_channels];
  const int64_t rows = has_short_rows<T>(tile) ? padded_rows : tile.channels > 1 ? rows_of_channel_sums : tile.rows;
  for (int64_t row = 0; row < tile.rows; row += rows) {
    for (int64_t channel = 0; channel < tile.channels; ++channel) {
      Tile part = tile;
      part.offset += row * tile.row_stride + channel * tile.cols;
      part.rows = std::min(rows, tile.rows - row);
      part.channels = 1;
      WideSums<A> terms = sum(channel, row, part);
      if (row > 0) terms.join(total[channel].sums);
      new (&total[channel].sums) WideSums<A>(terms);
    }
  }
  for (int64_t channel = 0; channel < tile.channels; ++channel) {
    sums.first[channel] += total[channel].sums.first_total().total();
    sums.second[channel] += total[channel].sums.second_total().total();
  }
}

// Bytes of rows of float64 whose sums are added up in registers, with their errors, before they are added to those of a
// tile, in groups of eight rows. Longer strips take up to 1.7 times as long (4096x512; a Xeon with 48 KiB of L1).
constexpr int64_t strip_bytes_of_double = 32768;

// Adds the sums of a tile's columns to `sums`. `prepare(column, lanes)` returns the coefficients that `add(terms,
// prepared, row, column, lanes)` uses.
template <class T, class Terms, class Prepare, class Add>
FASTBN_INLINE void sum_columns(const Tile& tile, int64_t rows, ColumnSums sums, Prepare&& prepare, Add&& add) {
  constexpr bool is_double = std::is_same_v<T, double>;
  const int64_t strip_rows = is_double
                                 ? std::max(rows, strip_bytes_of_double / (tile.cols * int64_t(sizeof(T))) / 8 * 8)
                                 : std::min(rows, Terms::max_terms);
  auto strip = [&](int64_t begin, int64_t end, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
    const auto prepared = prepare(column, lanes);
    WideSums<acc_t<T>> wide;
    for (int64_t row = begin, next; row < end; row = next) {
      next = is_double ? std::min(end, row + Terms::max_terms) : end;
      Terms terms;
      for (int64_t at = row; at < next; ++at) add(terms, prepared, at, column, lanes);
      wide.join(in_memory_order<T>(terms));
    }
    add_columns(sums, column, tile.cols, wide);
  };
  for_each_strip<T>(tile, strip_rows, strip);
}

// Returns the mean of 16 elements of a channel if it lies within the range of the five samples, else `median`. The
// median of five is often some standard deviations off the mean, and the larger squares multiply the error of a float64
// variance. The mean of 16 equal elements is exactly that element.
FASTBN_INLINE double nearer_pivot(const double* data, const Layout& layout, int64_t channel, double median,
                                  const double (&sample)[pivot_samples]) {
  constexpr int elements = 16;
  double sum[elements];
  for (int i = 0; i < elements; ++i) {
    const int64_t element = layout.count() * (2 * i + 1) / (2 * elements);
    const int64_t run = element / layout.inner * layout.channels + channel;
    sum[i] = data[run * layout.inner + element % layout.inner] / elements;
  }
  for (int step = elements / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
  double low = median, high = median;
  for (double value : sample) {
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  return sum[0] >= low && sum[0] <= high && sum[0] - sum[0] == 0 ? sum[0] : median;
}

// Writes the pivot (pivot.h) of each channel in [begin, end). With channels innermost it computes a vector of them at a
// time.
template <class T>
void pivots(const void* data, const Layout& layout, int64_t begin, int64_t end, void* result) {
  using A = acc_t<T>;
  const T* first[pivot_samples];  // the samples of channel 0
  for (int i = 0; i < pivot_samples; ++i) first[i] = static_cast<const T*>(data) + pivot_sample(layout, i);
  A* const pivot = static_cast<A*>(result);
  int64_t channel = begin;
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int64_t lanes = Vec<A>::lanes;
    for (; layout.inner == 1 && channel + lanes <= end; channel += lanes) {
      Vec<A> sample[pivot_samples];
      for (int i = 0; i < pivot_samples; ++i) sample[i] = finite_sample(load(first[i] + channel, AllLanes<T>{}));
      store(pivot + channel, from_order_of<T>(median(sample)));
    }
  }
  for (; channel < end; ++channel) {
    A sample[pivot_samples];
    for (int i = 0; i < pivot_samples; ++i) sample[i] = finite_sample(to_acc(first[i][channel * layout.inner]));
    pivot[channel] = median(sample);
    if constexpr (std::is_same_v<T, double>)
      pivot[channel] = nearer_pivot(static_cast<const T*>(data), layout, channel, pivot[channel], sample);
  }
}

template <class T, class Terms>
void channel_sums(const void* data, Tile tile, const void* pivots, ColumnSums sums) {
  using A = acc_t<T>;
  PaddedRows<T> padded_input;
  sum_channels<T>(tile, sums, [&](int64_t channel, int64_t, Tile part) FASTBN_INLINE_LAMBDA {
    const void* source = data;
    if (has_short_rows<T>(part)) {
      source = padded_input.copy(data, part);
      part = padded<T>(part);
    }
    const InputRows<T> input(source, part, part.row_stride);
    const Vec<A> narrow_pivot(static_cast<const A*>(pivots)[channel]);
    const typename Terms::Value pivot(narrow_pivot);
    return sum_channel<T, Terms>(part, [&](Terms& terms, int64_t row, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
      const T* at = input.at(row * part.row_stride + column);
      if constexpr (std::is_same_v<decltype(lanes), AllLanes<T>>)
        terms.add_shifted(Terms::load_value(at, lanes), pivot);
      else
        terms.add_shifted(typename Terms::Value(keep(lanes, load(at, lanes), narrow_pivot)), pivot);
    });
  });
}

template <class T, class Terms>
void sum_columns_of_rows(const void* data, const Tile& tile, const void* pivots, ColumnSums sums) {
  using A = acc_t<T>;
  using Value = typename Terms::Value;
  const InputRows<T> input(data, tile, rows_ahead_of_column_sums * tile.row_stride);
  sum_columns<T, Terms>(
      tile, rows_of_column_sums<T>(tile), sums,
      [&](int64_t column, auto lanes)
          FASTBN_INLINE_LAMBDA { return Terms::load_value(static_cast<const A*>(pivots) + column, lanes); },
      [&](Terms& terms, const Value& pivot, int64_t row, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
        terms.add_shifted(Terms::load_value(input.at(row * tile.row_stride + column), lanes), pivot);
      });
}

template <class T, class Terms>
void column_sums(const void* data, Tile tile, const void* pivots, ColumnSums sums) {
  if (has_short_rows<T>(tile)) {
    PaddedRows<T> padded_input;
    for (int64_t row = 0; row < tile.rows; row += padded_rows) {
      const Tile part = part_to_pad(tile, row);
      sum_columns_of_rows<T, Terms>(padded_input.copy(data, part), padded<T>(part), pivots, sums);
    }
  } else {
    sum_columns_of_rows<T, Terms>(data, tile, pivots, sums);
  }
}

}  // namespace fastbn::cpu::FASTBN_ISA
