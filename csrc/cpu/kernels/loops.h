// Loops over a tile that all kernels share. A visitor is called with AllLanes or EndLanes, and so is compiled once for
// full vectors and, where the end of a row is different, once for that.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/vec_memory.h"

namespace fastbn::cpu::FASTBN_ISA {

// Rows that a loop reads in parallel. The estimate is the number of streams that hardware prefetches.
constexpr int64_t rows_of_channel_sums = 8, rows_of_strip = 4;

// Rows of column sums. With AVX-512, long rows of float32 are bound by memory, and fewer of them are fewer streams.
// Relative to 16 rows, or 8 of each tensor in backward, half as many take 0.83 to 1.0 of the time in L2 and L3 (49x2048
// to 1568x1024), and a quarter 0.6 to 0.95 out of cache (6272x512 to 6272x1024; EPYC 9005). Where a core is busier,
// they are slower: by 1.0 to 1.1 for half types and for rows of up to 1 KiB, and by 1.0 to 1.2 with AVX2.
constexpr int64_t min_bytes_of_few_rows = 2048;

template <class T>
FASTBN_INLINE int64_t rows_of_column_sums(const Tile& tile) {
  const bool few =
      std::is_same_v<T, float> && register_bytes == 64 && tile.cols * int64_t(sizeof(T)) >= min_bytes_of_few_rows;
  return few ? (tile.out_of_cache ? 4 : 8) : 16;
}
template <class T>
FASTBN_INLINE int64_t rows_of_column_grad_sums(const Tile& tile) {
  return rows_of_column_sums<T>(tile) / 2;
}

// Prefetch distance of column sums in tiles that are out of cache; channel sums prefetch the next row. Speed relative
// to no prefetching: gradient sums of 16x256x28x28 float32 in channels_last 1.6 (EPYC 9004); contiguous, the forward of
// 16x128x28x28 to 16x512x28x28 1.0 to 1.25 and the backward 1.0 to 1.3 (EPYC 7003). Other loops follow memory order,
// which hardware prefetches: ops that do not prefetch there are 0.96 to 1.15 times as fast, most of them faster (EPYC
// 9004).
constexpr int64_t rows_ahead_of_column_sums = 8;

// Tiles that are out of cache, with rows of at least this many bytes, are therefore walked row by row. Speed relative
// to strips: 1.1 to 1.3 for 16x512x14x14 to 16x128x56x56 float32; 1.0 to 1.1 for 16x256x28x28 to 16x256x56x56 bfloat16,
// where a core is busier converting elements than loading coefficients; 0.97 for 16x1024x14x14; 0.9 for rows of 256
// bytes (EPYC 7003). On an EPYC 9004 it is 1.5 for 16x256x28x28 float32, but 0.8 for 16x512x14x14 if nothing else is in
// the 32 MiB of L3.
constexpr int64_t min_bytes_by_row = 512;

// Memory traffic per thread from which non-temporal stores pay. Time of an op with non-temporal stores relative to
// regular ones, and in brackets the same followed by a sum over its outputs or an in-place relu, float32 on two cores,
// several runs. Xeon, 2 MiB of L2 per core: forward, 49 MiB of traffic, 0.6 to 1.1 (0.7 to 1.2); backward, 37 MiB, 0.8
// to 0.9 (0.9 to 1.1), 74 MiB, 0.7 to 0.8 (0.8 to 0.9). EPYC 7003, 0.5 MiB of L2 per core and 32 MiB of L3: forward, 24
// MiB, 0.7 to 0.8 (0.8 to 0.9), 12 MiB, 0.8 to 1.1 (1.0 to 1.9); backward, 37 MiB, 0.8 to 0.9 (0.8 to 0.9), 18 MiB, 0.8
// to 1.0 (0.9 to 1.1).
#if defined(__AVX512F__)
constexpr int64_t min_streamed_bytes_per_thread = int64_t(16) << 20;
#else
constexpr int64_t min_streamed_bytes_per_thread = int64_t(10) << 20;
#endif

// Calls `visit(column, lanes)` for the columns of a row. Without AVX-512, the last vector takes all lanes and may
// overlap the one before it, so that there is one loop to compile instead of two. (g++ 12 took twice as long for two.)
template <class T, class Visit>
FASTBN_INLINE void for_each_column(int64_t cols, Visit&& visit) {
  constexpr int64_t lanes = Vec<acc_t<T>>::lanes;
  if constexpr (overlaps_at_ends) {
    for (int64_t j = 0;;) {
      visit(j, AllLanes<T>{});
      j += lanes;
      if (j + lanes <= cols) continue;
      if (j >= cols) return;
      j = cols - lanes;
    }
  } else {
    int64_t j = 0;
    for (; j + lanes <= cols; j += lanes) visit(j, AllLanes<T>{});
    if (j < cols) visit_end<T>(cols, visit);
  }
}

// Calls `visit(begin row, end row, column, lanes)` for strips of `rows` rows that are one vector wide.
template <class T, class Visit>
FASTBN_INLINE void for_each_strip(const Tile& tile, int64_t rows, Visit&& visit) {
  for (int64_t begin = 0; begin < tile.rows; begin += rows) {
    const int64_t end = std::min(tile.rows, begin + rows);
    for_each_column<T>(tile.cols,
                       [&](int64_t column, auto lanes) FASTBN_INLINE_LAMBDA { visit(begin, end, column, lanes); });
  }
}

// Calls `visit(chain, row, column, lanes)` row by row, cycling through `chains` independent chains of operations, and
// `flush()` before any chain has received more than `max_terms` vectors.
template <class T, int chains, int64_t max_terms, class Visit, class Flush>
FASTBN_INLINE void for_each_batch(const Tile& tile, Visit&& visit, Flush&& flush) {
  constexpr int64_t lanes = Vec<acc_t<T>>::lanes, step = chains * lanes;
  int64_t terms = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t j = 0, end; j < tile.cols; j = end) {
      end = tile.cols - j > max_terms * step ? j + max_terms * step : tile.cols;
      const int64_t added = (end - j + step - 1) / step;
      if (terms + added > max_terms) {
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
        visit_end<T>(tile.cols, [&](int64_t at, auto last) FASTBN_INLINE_LAMBDA { visit(chains - 1, row, at, last); });
    }
  }
  flush();
}

// A tile of an input, possibly null. If the tile is out of cache, each access prefetches the element `ahead` elements
// later, which the loop reads next and hardware would not prefetch.
template <class T>
class InputRows {
 public:
  FASTBN_INLINE InputRows(const void* input, const Tile& tile, int64_t ahead = 0)
      : data_(input ? static_cast<const T*>(input) + tile.offset : nullptr), ahead_(tile.out_of_cache ? ahead : 0) {}

  FASTBN_INLINE explicit operator bool() const { return data_; }

  FASTBN_INLINE const T* at(int64_t at) const {
    if (ahead_ != 0) __builtin_prefetch(data_ + at + ahead_);
    return data_ + at;
  }

 private:
  const T* data_;
  int64_t ahead_;
};

// A tile of an output, possibly null. Full vectors use non-temporal stores if asked for and if each is a cache line.
template <class T>
class OutputRows {
 public:
  using V = Vec<acc_t<T>>;

  FASTBN_INLINE OutputRows(void* output, const Tile& tile, bool non_temporal)
      : data_(output ? static_cast<T*>(output) + tile.offset : nullptr),
        non_temporal_(non_temporal && reinterpret_cast<uintptr_t>(data_) % (V::lanes * sizeof(T)) == 0 &&
                      tile.row_stride % V::lanes == 0) {}
  FASTBN_INLINE ~OutputRows() {
    if (fills_line<T> && non_temporal_) finish_streaming();
  }

  FASTBN_INLINE explicit operator bool() const { return data_; }

  FASTBN_INLINE void store(int64_t at, const V& x, AllLanes<T> lanes) const {
    // The vector at the end of a row that overlaps another one is no cache line.
    if (fills_line<T> && non_temporal_ && !(overlaps_at_ends && at % V::lanes != 0))
      stream(data_ + at, x);
    else
      FASTBN_ISA::store(data_ + at, x, lanes);
  }
  FASTBN_INLINE void store(int64_t at, const V& x, EndLanes<T> lanes) const { FASTBN_ISA::store(data_ + at, x, lanes); }

 private:
  T* data_;
  bool non_temporal_;
};

}  // namespace fastbn::cpu::FASTBN_ISA
