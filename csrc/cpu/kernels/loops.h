// The walks over a block that all leaf loops share. A visitor is called with AllLanes or EndLanes, so that every loop
// is compiled once for full vectors and once for the end of a row.
#pragma once

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/vec_memory.h"

namespace fastbn::cpu::FASTBN_ISA {

// Estimate: so many rows at once are as many streams as hardware prefetches. Gradients walk two tensors: backward of
// 16x64x56x56 to 16x2048x7x7 float32 takes 0.74 to 0.95 of the time with 8 rows instead of 16 (EPYC 7003).
constexpr int64_t rows_of_column_sums = 16, rows_of_column_grad_sums = 8, rows_of_channel_sums = 8, rows_of_strip = 4;

// Of blocks that are far, sums of columns ask for so many rows ahead, sums of channels for the next row. Speed over not
// asking: sums of gradients of 16x256x28x28 float32 in channels_last 1.6 (EPYC 9004); contiguous, forward of
// 16x128x28x28 to 16x512x28x28 1.0 to 1.25 and backward 1.0 to 1.3 (EPYC 7003). Other loops follow the order of memory,
// which hardware foresees: ops that do not ask there are 0.96 to 1.15 times as fast, most of them faster (EPYC 9004).
constexpr int64_t rows_ahead_of_column_sums = 8;

// Far rows that are this long are therefore walked one by one: against strips, speed is 1.1 to 1.3 for 16x512x14x14 to
// 16x128x56x56 float32, 1.0 to 1.1 for 16x256x28x28 to 16x256x56x56 bfloat16, whose conversions keep a core busier than
// loads of coefficients, and 0.97 for 16x1024x14x14; 0.9 for rows of 256 bytes (EPYC 7003). On an EPYC 9004 it is 1.5
// for 16x256x28x28 float32, but 0.8 for 16x512x14x14 where nothing else is in the 32 MiB of L3.
constexpr int64_t least_bytes_by_row = 512;

// Time of an op with stores past the caches over that with others, and in brackets the same with a sum over its outputs
// behind it, or a relu in place, float32 on two cores, several runs. Xeon, 2 MiB of L2 each: forward, 49 MiB touched,
// 0.6 to 1.1 (0.7 to 1.2); backward, 37 MiB, 0.8 to 0.9 (0.9 to 1.1), 74 MiB, 0.7 to 0.8 (0.8 to 0.9). EPYC 7003, 0.5
// MiB of L2 each and 32 MiB of L3: forward, 24 MiB, 0.7 to 0.8 (0.8 to 0.9), 12 MiB, 0.8 to 1.1 (1.0 to 1.9); backward,
// 37 MiB, 0.8 to 0.9 (0.8 to 0.9), 18 MiB, 0.8 to 1.0 (0.9 to 1.1).
#if defined(__AVX512F__)
constexpr int64_t streamed_bytes_a_thread = int64_t(16) << 20;
#else
constexpr int64_t streamed_bytes_a_thread = int64_t(10) << 20;
#endif

// visit(column, lanes) over the columns of a row.
template <class T, class Visit>
FASTBN_INLINE void for_each_column(int64_t cols, Visit&& visit) {
  constexpr int64_t lanes = Vec<acc_t<T>>::lanes;
  int64_t j = 0;
  for (; j + lanes <= cols; j += lanes) visit(j, AllLanes<T>{});
  if (j < cols) visit_end<T>(cols, visit);
}

// visit(begin row, end row, column, lanes): down a few rows, one vector wide, then the next vector.
template <class T, class Visit>
FASTBN_INLINE void for_each_strip(const Block& block, int64_t rows, Visit&& visit) {
  for (int64_t begin = 0; begin < block.rows; begin += rows) {
    const int64_t end = std::min(block.rows, begin + rows);
    for_each_column<T>(block.cols,
                       [&](int64_t column, auto lanes) FASTBN_INLINE_LAMBDA { visit(begin, end, column, lanes); });
  }
}

// visit(chain, row, column, lanes) row by row, by turns with one of `chains` independent chains of operations, and
// flush() before any of these has been given more than `longest` vectors.
template <class T, int chains, int64_t longest, class Visit, class Flush>
FASTBN_INLINE void for_each_batch(const Block& block, Visit&& visit, Flush&& flush) {
  constexpr int64_t lanes = Vec<acc_t<T>>::lanes, step = chains * lanes;
  int64_t terms = 0;
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t j = 0, end; j < block.cols; j = end) {
      end = block.cols - j > longest * step ? j + longest * step : block.cols;
      const int64_t added = (end - j + step - 1) / step;
      if (terms + added > longest) {
        flush();
        terms = 0;
      }
      terms += added;
      for (; j + step <= end; j += step)
        for (int chain = 0; chain < chains; ++chain) visit(chain, row, j + chain * lanes, AllLanes<T>{});
      for (int chain = 0; chain < chains - 1; ++chain) {
        if (j + lanes > end) break;
        visit(chain, row, j, AllLanes<T>{});
        j += lanes;
      }
      if (j < end)
        visit_end<T>(block.cols, [&](int64_t at, auto last) FASTBN_INLINE_LAMBDA { visit(chains - 1, row, at, last); });
    }
  }
  flush();
}

// A block of an input, or nothing. Of one that is far, memory is asked for the element `ahead` further on, which is
// what the loop reads next where hardware does not foresee it.
template <class T>
class InputRows {
 public:
  FASTBN_INLINE InputRows(const void* input, const Block& block, int64_t ahead = 0)
      : data_(input ? static_cast<const T*>(input) + block.offset : nullptr), ahead_(block.far ? ahead : 0) {}

  FASTBN_INLINE explicit operator bool() const { return data_; }

  FASTBN_INLINE const T* at(int64_t at) const {
    if (ahead_ != 0) __builtin_prefetch(data_ + at + ahead_);
    return data_ + at;
  }

 private:
  const T* data_;
  int64_t ahead_;
};

// A block of an output, or nothing. Full vectors go past the caches if asked for, where each is a line.
template <class T>
class OutputRows {
 public:
  using V = Vec<acc_t<T>>;

  FASTBN_INLINE OutputRows(void* output, const Block& block, bool past_caches)
      : data_(output ? static_cast<T*>(output) + block.offset : nullptr),
        past_caches_(past_caches && reinterpret_cast<uintptr_t>(data_) % (V::lanes * sizeof(T)) == 0 &&
                     block.row_stride % V::lanes == 0) {}
  FASTBN_INLINE ~OutputRows() {
    if (fills_line<T> && past_caches_) finish_streaming();
  }

  FASTBN_INLINE explicit operator bool() const { return data_; }

  FASTBN_INLINE void store(int64_t at, const V& x, AllLanes<T> lanes) const {
    if (fills_line<T> && past_caches_)
      stream(data_ + at, x);
    else
      FASTBN_ISA::store(data_ + at, x, lanes);
  }
  FASTBN_INLINE void store(int64_t at, const V& x, EndLanes<T> lanes) const { FASTBN_ISA::store(data_ + at, x, lanes); }

 private:
  T* data_;
  bool past_caches_;
};

}  // namespace fastbn::cpu::FASTBN_ISA
