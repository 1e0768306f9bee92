// Cuts a tensor into tiles that fit in a core's cache; the cut depends on the layout alone. With channels outermost
// (NCHW-like), a tile lies in one channel, or in a few neighbouring channels if their runs are short. With channels
// innermost (NHWC-like), a tile is a range of rows, and its columns are channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "math/layout.h"
#include "math/moments.h"

namespace fastbn::cpu {

// Tiles of tensors of at least this size prefetch. In smaller ones prefetching gains little or costs time: forward and
// backward take 0.96 times as long for 16x256x14x14 bfloat16, and 1.09 times for 16x512x7x7 float32 (1.5 MiB each). It
// also costs time where a few rows fill an L1 cache: 1.1 to 1.3 times for 16x2048x7x7 (EPYC 7003). So tensors of longer
// rows have to be larger: 16x1024x14x14 float32, 12 MiB, takes 0.6 to 0.9 of the time with it, and 8x2048x14x14 as long
// as without; evaluation takes 1.7 to 2.2 times as long for 64x65536 (EPYC 9005).
constexpr int64_t min_out_of_cache_bytes = int64_t(2) << 20, max_short_row_bytes = 2048;
constexpr int64_t min_out_of_cache_bytes_of_long_rows = int64_t(8) << 20, max_prefetched_row_bytes = 4096;

// Minimum length of a run, with channels outermost, for which a group of channels goes through all phases while it is
// in cache, which writes the output run by run. Shorter runs are cheaper to write in memory order, although that reads
// the input twice. Time of that order relative to groups, float32 on one thread, forward and backward: runs of 196 to
// 512 bytes 0.68 to 0.99, of 784 bytes 0.53 to 0.95, of 1 KiB 0.6 to 1.03, of 1600 bytes 0.56 to 0.86, of 3 and 4 KiB
// 0.93 to 1.22; bfloat16, of 98 to 800 bytes 0.38 to 0.93, of 1568 bytes 0.76 to 1.04, of 2 KiB 0.89 to 1.11. On two
// threads, where a core's cache no longer holds what it writes, it is 0.7 to 1.5 for those up to 1600 bytes (EPYC
// 9005).
constexpr int64_t min_run_bytes_of_group = 2048;

// A sum with its rounding errors (kernels/sums.h says why).
struct SumWithRest {
  double sum = 0, rest = 0;

  void add(double term) {
    const double next = sum + term;
    rest += rest_of_sum(sum, term, next);
    sum = next;
  }
  double total() const { return rest - rest == 0 ? sum + rest : sum; }
};

// The tiles of a tensor's first `channels` channels: all channels, or those of a panel (panels.h).
class Partition {
 public:
  Partition(const Layout& layout, DType dtype, int64_t channels)
      : layout_(layout),
        channels_(channels),
        in_columns_(layout.channels_are_innermost()),
        is_float64_(dtype == DType::float64) {
    const int64_t bytes = layout.numel() * element_size(dtype);
    if (in_columns_) {
      // Several rows of few channels are packed into one, so that vectors are full. The mask bits of a packed row fit
      // in a word.
      fold_ = std::max<int64_t>(1, 64 / layout.channels);
      width_ = fold_ * channels;
      row_stride_ = fold_ * layout.channels;
      rows_ = layout.outer / fold_;
      tail_ = (layout.outer - rows_ * fold_) * layout.channels;
      // 16 tiles split evenly among threads: 16x512x7x7 on two threads is 10 % faster with 16 than with 7. More tiles
      // cost more to merge than they gain: 4096x512 bfloat16 is 25 % slower with 128 than with 32.
      rows_per_tile_ = std::max<int64_t>(std::min(65536 / row_stride_, rows_ / 16), 16);
      tiles_ = (rows_ + rows_per_tile_ - 1) / rows_per_tile_ + (tail_ > 0);
      const int64_t row_bytes = row_stride_ * element_size(dtype);
      out_of_cache_ =
          row_bytes <= max_prefetched_row_bytes &&
          bytes >= (row_bytes <= max_short_row_bytes ? min_out_of_cache_bytes : min_out_of_cache_bytes_of_long_rows);
    } else {
      // Several channels of short runs share a tile, so that its part of an image is long. Before short runs were
      // written in memory order, training took 333 instead of 469 us for 16x2048x7x7 bfloat16 (two threads of a Xeon).
      const int64_t max_width = std::min<int64_t>({1024 / layout.inner, 65536 / layout.count(), max_tile_channels});
      width_ = std::clamp<int64_t>(max_width, 1, layout.channels);
      // Estimate: 16 Ki elements are enough work for a call, and few enough to split evenly among threads.
      constexpr int64_t tile_elements = 16384;
      rows_per_tile_ = std::max<int64_t>(1, tile_elements / (width_ * layout.inner));
      channels_per_image_tile_ = std::max<int64_t>(1, tile_elements / layout.inner);
      const int64_t pieces = (layout.inner + tile_elements - 1) / tile_elements;
      piece_size_ = ((layout.inner + pieces - 1) / pieces + 63) / 64 * 64;  // full mask bytes and vectors
      pieces_ = (layout.inner + piece_size_ - 1) / piece_size_;
      tiles_per_group_ = (layout.outer + rows_per_tile_ - 1) / rows_per_tile_ * pieces_;
      groups_ = (layout.channels + width_ - 1) / width_;
      goes_by_group_ = layout.inner * element_size(dtype) >= min_run_bytes_of_group;
      tiles_ = groups_ * tiles_per_group_;
      out_of_cache_ = bytes >= min_out_of_cache_bytes && width_ == 1 && pieces_ == 1;
    }
  }

  bool in_columns() const { return in_columns_; }
  int64_t tiles() const { return tiles_; }

  int64_t elements() const { return layout_.count() * channels_; }
  int64_t channels() const { return channels_; }

  // Returns the number of channels or columns of a tile, each of which has two partial sums.
  int64_t width() const { return width_; }
  int64_t partials() const { return tiles_ * width_; }

  // Returns the number of entries of a coefficient table: one per channel, or one per column if channels are columns.
  int64_t entries() const { return in_columns_ ? width_ : channels_; }

  // Returns the number of groups of channels. With channels outermost, the channels of a group share the tiles [group *
  // tiles_per_group, (group + 1) * tiles_per_group).
  int64_t groups() const { return groups_; }
  int64_t tiles_per_group() const { return tiles_per_group_; }
  // Returns whether each of enough groups goes through all phases while it is in cache.
  bool goes_by_group() const { return goes_by_group_; }

  // Returns the channel at which a tile's coefficients begin: its first one, or 0 with channels innermost.
  int64_t first_channel(int64_t tile) const { return in_columns_ ? 0 : tile / tiles_per_group_ * width_; }
  int64_t end_channel(int64_t tile) const { return std::min(first_channel(tile) + width_, layout_.channels); }

  Tile tile(int64_t index) const {
    if (in_columns_) {
      const int64_t first = index * rows_per_tile_;
      if (first >= rows_) return {rows_ * row_stride_, 1, row_stride_, tail_};
      return {first * row_stride_, std::min(rows_per_tile_, rows_ - first), row_stride_, width_, 0, 1, out_of_cache_};
    }
    const int64_t channel = first_channel(index), part = index % tiles_per_group_;
    const int64_t first = part / pieces_ * rows_per_tile_, column = part % pieces_ * piece_size_;
    return {(first * layout_.channels + channel) * layout_.inner + column,
            std::min(rows_per_tile_, layout_.outer - first),
            layout_.channels * layout_.inner,
            std::min(piece_size_, layout_.inner - column),
            0,
            end_channel(index) - channel,
            out_of_cache_};
  }

  MaskTile mask_tile(int64_t index) const {
    const int64_t bytes = layout_.mask_bytes_per_run(), run = layout_.run();
    if (in_columns_) return {std::min(index * rows_per_tile_, rows_) * fold_ * bytes, fold_ * bytes, run};
    const int64_t channel = first_channel(index), part = index % tiles_per_group_;
    const int64_t first = part / pieces_ * rows_per_tile_, column = part % pieces_ * piece_size_;
    return {(first * layout_.channels + channel) * bytes + column / 8, layout_.channels * bytes, run};
  }

  // Calls `call(tile, mask, first channel)` for the parts of a tile that leaf loops without sums take: the tile itself
  // if it has one channel, else one image after the other, the last first, with the channels of the image as rows.
  template <class Call>
  void for_each_image_part(int64_t index, Call&& call) const {
    const Tile all = tile(index);
    const MaskTile mask = mask_tile(index);
    const int64_t channel = first_channel(index);
    if (all.channels == 1) return call(all, mask, channel);
    for (int64_t row = all.rows - 1; row >= 0; --row)
      call(Tile{all.offset + row * all.row_stride, all.channels, all.cols, all.cols, 1},
           MaskTile{mask.offset + row * mask.row_stride, layout_.mask_bytes_per_run(), mask.run}, channel);
  }

  // A second partition, in memory order, for ops without sums. Where runs are shorter than a tile, the rows of a tile
  // are consecutive channels of one image.
  bool has_image_tiles() const { return !in_columns_ && pieces_ == 1; }
  int64_t image_tiles() const { return layout_.outer * parts_of_image(); }
  int64_t first_image_channel(int64_t index) const { return index % parts_of_image() * channels_per_image_tile_; }

  Tile image_tile(int64_t index) const {
    const int64_t channel = first_image_channel(index);
    const int64_t first = index / parts_of_image() * layout_.channels + channel;
    return {first * layout_.inner, std::min(channels_per_image_tile_, layout_.channels - channel), layout_.inner,
            layout_.inner, 1};
  }

  MaskTile image_mask_tile(int64_t index) const {
    const int64_t first = index / parts_of_image() * layout_.channels + first_image_channel(index);
    const int64_t bytes = layout_.mask_bytes_per_run();
    return {first * bytes, bytes, layout_.run()};
  }

  // Returns where a tile's partial sums are stored: the first sums of all columns, then the second ones.
  ColumnSums column_sums(int64_t tile, double* partials) const {
    double* first = partials + 2 * tile * width_;
    return {first, first + width_};
  }

  // Adds up the partial sums of channels [begin, end), so that each channel is always summed in the same order; those
  // of float64 with their rounding errors.
  void merge(double* partials, int64_t begin, int64_t end, ColumnSums totals) const {
    if (!in_columns_) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t tile = c / width_ * tiles_per_group_;
        SumWithRest first, second;
        for (int64_t i = tile; i < tile + tiles_per_group_; ++i) {
          const ColumnSums sums = column_sums(i, partials);
          first.add(sums.first[c % width_]);
          second.add(sums.second[c % width_]);
        }
        totals.first[c] = first.total();
        totals.second[c] = second.total();
      }
    } else if (is_float64_) {
      for (int64_t first = begin; first < end; first += chunk_channels) {
        const int64_t channels = std::min(chunk_channels, end - first);
        SumWithRest sum[chunk_channels], sum_of_second[chunk_channels];
        for_each_partial(partials, first, [&](const double* firsts, const double* seconds) {
          for (int64_t c = 0; c < channels; ++c) sum[c].add(firsts[c]);
          for (int64_t c = 0; c < channels; ++c) sum_of_second[c].add(seconds[c]);
        });
        for (int64_t c = 0; c < channels; ++c) totals.first[first + c] = sum[c].total();
        for (int64_t c = 0; c < channels; ++c) totals.second[first + c] = sum_of_second[c].total();
      }
    } else {  // double has digits to spare
      std::fill(totals.first + begin, totals.first + end, 0.0);
      std::fill(totals.second + begin, totals.second + end, 0.0);
      for_each_partial(partials, begin, [&](const double* firsts, const double* seconds) {
        for (int64_t c = begin; c < end; ++c) totals.first[c] += firsts[c - begin];
        for (int64_t c = begin; c < end; ++c) totals.second[c] += seconds[c - begin];
      });
    }
  }

 private:
  // Calls `use(first sums, second sums)` for all partial sums of columns, in memory order, with the addresses of those
  // of channel `begin`.
  template <class Use>
  void for_each_partial(double* partials, int64_t begin, Use&& use) const {
    for (int64_t i = 0; i < tiles_; ++i) {
      const ColumnSums sums = column_sums(i, partials);
      const int64_t cols = i + 1 == tiles_ && tail_ > 0 ? tail_ : width_;
      for (int64_t j = begin; j < cols; j += channels_) use(sums.first + j, sums.second + j);
    }
  }

  int64_t parts_of_image() const {
    return (layout_.channels + channels_per_image_tile_ - 1) / channels_per_image_tile_;
  }

  Layout layout_;
  int64_t channels_;
  bool in_columns_, is_float64_, out_of_cache_ = false, goes_by_group_ = false;
  int64_t width_ = 0, rows_per_tile_ = 0, tiles_ = 0;
  int64_t fold_ = 1, row_stride_ = 0, rows_ = 0, tail_ = 0;                 // channels innermost
  int64_t piece_size_ = 0, pieces_ = 0, tiles_per_group_ = 0, groups_ = 0;  // channels outermost
  int64_t channels_per_image_tile_ = 0;
};

}  // namespace fastbn::cpu
