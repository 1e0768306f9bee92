// Cuts a tensor into blocks of a size that a core's cache holds, by its layout alone. Where channels have runs, a block
// lies in one channel, or in a few neighbours whose runs are short; where they are innermost, it is a range of rows and
// its columns are channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "math/layout.h"

namespace fastbn::cpu {

// Blocks of tensors of so many bytes are far. Below, asking ahead gains little or costs: forward and backward take 0.96
// times as long for 16x256x14x14 bfloat16 and 1.09 for 16x512x7x7 float32 (1.5 MiB each). It costs as well where a few
// rows of columns fill an L1 cache: 1.1 to 1.3 times for 16x2048x7x7 (EPYC 7003).
constexpr int64_t least_far_bytes = int64_t(2) << 20, longest_far_row = 2048;

class Partition {
 public:
  // Of the first `channels` of a tensor's channels, which are all or, of few rows, a panel (panels.h).
  Partition(const Layout& layout, DType dtype, int64_t channels)
      : layout_(layout), channels_(channels), in_columns_(layout.channels_are_innermost()) {
    const int64_t bytes = layout.numel() * element_size(dtype);
    if (in_columns_) {
      // Rows of few channels are taken several at once, so that vectors are full; their bits fit in a word.
      group_ = std::max<int64_t>(1, 64 / layout.channels);
      width_ = group_ * channels;
      row_stride_ = group_ * layout.channels;
      rows_ = layout.outer / group_;
      rest_ = (layout.outer - rows_ * group_) * layout.channels;
      // 16 blocks share out evenly: 16x512x7x7 on two threads is 10 % faster than in 7. More cost more to merge than
      // they gain: 4096x512 bfloat16 is 25 % slower in 128 than in 32.
      rows_per_block_ = std::max<int64_t>(std::min(65536 / row_stride_, rows_ / 16), 16);
      blocks_ = (rows_ + rows_per_block_ - 1) / rows_per_block_ + (rest_ > 0);
      far_ = bytes >= least_far_bytes && row_stride_ * element_size(dtype) <= longest_far_row;
    } else {
      // Channels of short runs are taken several at once, so that an image's part of a block is long, but no more than
      // stay in a core's cache: training takes 333 instead of 469 us for 16x2048x7x7 bfloat16 (two threads of a Xeon).
      const int64_t most = std::min<int64_t>({1024 / layout.inner, 65536 / layout.count(), most_channels});
      width_ = std::clamp<int64_t>(most, 1, layout.channels);
      // Estimate: 16 Ki elements are work enough for a call, and little enough to share out evenly.
      constexpr int64_t block_elements = 16384;
      rows_per_block_ = std::max<int64_t>(1, block_elements / (width_ * layout.inner));
      channels_per_image_block_ = std::max<int64_t>(1, block_elements / layout.inner);
      const int64_t pieces = (layout.inner + block_elements - 1) / block_elements;
      piece_ = ((layout.inner + pieces - 1) / pieces + 63) / 64 * 64;  // whole mask bytes, whole vectors
      pieces_ = (layout.inner + piece_ - 1) / piece_;
      per_group_ = (layout.outer + rows_per_block_ - 1) / rows_per_block_ * pieces_;
      groups_ = (layout.channels + width_ - 1) / width_;
      blocks_ = groups_ * per_group_;
      far_ = bytes >= least_far_bytes && width_ == 1 && pieces_ == 1;
    }
  }

  bool in_columns() const { return in_columns_; }
  int64_t blocks() const { return blocks_; }

  int64_t elements() const { return layout_.count() * channels_; }
  int64_t channels() const { return channels_; }

  // Partial results a block, two numbers each: of its columns, or its channels.
  int64_t width() const { return width_; }
  int64_t partials() const { return blocks_ * width_; }

  // Entries of a table of coefficients: one a channel, or where channels are columns, one a column.
  int64_t entries() const { return in_columns_ ? width_ : channels_; }

  // Where channels have runs, those of a group share their blocks, which are [group * per_group, (group + 1) *
  // per_group).
  int64_t groups() const { return groups_; }
  int64_t per_group() const { return per_group_; }
  // A block's channels, where they have runs; in columns its entries in tables of coefficients begin at 0.
  int64_t first_channel(int64_t block) const { return in_columns_ ? 0 : block / per_group_ * width_; }
  int64_t end_channel(int64_t block) const { return std::min(first_channel(block) + width_, layout_.channels); }

  Block block(int64_t index) const {
    if (in_columns_) {
      const int64_t first = index * rows_per_block_;
      if (first >= rows_) return {rows_ * row_stride_, 1, row_stride_, rest_};
      return {first * row_stride_, std::min(rows_per_block_, rows_ - first), row_stride_, width_, 0, 1, far_};
    }
    const int64_t channel = first_channel(index), part = index % per_group_;
    const int64_t first = part / pieces_ * rows_per_block_, column = part % pieces_ * piece_;
    return {(first * layout_.channels + channel) * layout_.inner + column,
            std::min(rows_per_block_, layout_.outer - first),
            layout_.channels * layout_.inner,
            std::min(piece_, layout_.inner - column),
            0,
            end_channel(index) - channel,
            far_};
  }

  MaskBlock mask_block(int64_t index) const {
    const int64_t bytes = layout_.mask_bytes_per_run(), run = layout_.run();
    if (in_columns_) return {std::min(index * rows_per_block_, rows_) * group_ * bytes, group_ * bytes, run};
    const int64_t channel = first_channel(index), part = index % per_group_;
    const int64_t first = part / pieces_ * rows_per_block_, column = part % pieces_ * piece_;
    return {(first * layout_.channels + channel) * bytes + column / 8, layout_.channels * bytes, run};
  }

  // call(block, its mask, first channel): a block as leaf loops without sums take it, which is of one channel, or image
  // by image, the last first, whose rows are those of one channel after the other.
  template <class Call>
  void for_each_slice(int64_t index, Call&& call) const {
    const Block whole = block(index);
    const MaskBlock mask = mask_block(index);
    const int64_t channel = first_channel(index);
    if (whole.channels == 1) return call(whole, mask, channel);
    for (int64_t row = whole.rows - 1; row >= 0; --row)
      call(Block{whole.offset + row * whole.row_stride, whole.channels, whole.cols, whole.cols, 1},
           MaskBlock{mask.offset + row * mask.row_stride, layout_.mask_bytes_per_run(), mask.run}, channel);
  }

  // The same elements in the order of memory, for what needs no sums: where runs are shorter than a block, its rows are
  // those of one channel after the other of an image.
  bool has_image_blocks() const { return !in_columns_ && pieces_ == 1; }
  int64_t image_blocks() const { return layout_.outer * parts_of_image(); }
  int64_t first_image_channel(int64_t index) const { return index % parts_of_image() * channels_per_image_block_; }

  Block image_block(int64_t index) const {
    const int64_t channel = first_image_channel(index);
    const int64_t first = index / parts_of_image() * layout_.channels + channel;
    return {first * layout_.inner, std::min(channels_per_image_block_, layout_.channels - channel), layout_.inner,
            layout_.inner, 1};
  }

  MaskBlock image_mask_block(int64_t index) const {
    const int64_t first = index / parts_of_image() * layout_.channels + first_image_channel(index);
    const int64_t bytes = layout_.mask_bytes_per_run();
    return {first * bytes, bytes, layout_.run()};
  }

  // Where the partial results of a block's columns are: first of all columns, then second.
  ColumnSums column_sums(int64_t block, double* partials) const {
    double* first = partials + 2 * block * width_;
    return {first, first + width_};
  }

  // Adds up the partial results of channels [begin, end), block by block, so that memory is read in order and a
  // channel's order of additions is always the same.
  void merge(double* partials, int64_t begin, int64_t end, ColumnSums totals) const {
    std::fill(totals.first + begin, totals.first + end, 0.0);
    std::fill(totals.second + begin, totals.second + end, 0.0);
    if (!in_columns_) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = c / width_ * per_group_;
        for (int64_t i = first; i < first + per_group_; ++i) {
          const ColumnSums sums = column_sums(i, partials);
          totals.first[c] += sums.first[c % width_];
          totals.second[c] += sums.second[c % width_];
        }
      }
      return;
    }
    for (int64_t i = 0; i < blocks_; ++i) {
      const ColumnSums sums = column_sums(i, partials);
      const int64_t cols = i + 1 == blocks_ && rest_ > 0 ? rest_ : width_;
      for (int64_t j = 0; j < cols; j += channels_) {
        for (int64_t c = begin; c < end; ++c) totals.first[c] += sums.first[j + c];
        for (int64_t c = begin; c < end; ++c) totals.second[c] += sums.second[j + c];
      }
    }
  }

 private:
  int64_t parts_of_image() const {
    return (layout_.channels + channels_per_image_block_ - 1) / channels_per_image_block_;
  }

  Layout layout_;
  int64_t channels_;
  bool in_columns_, far_ = false;
  int64_t width_ = 0, rows_per_block_ = 0, blocks_ = 0;
  int64_t group_ = 1, row_stride_ = 0, rows_ = 0, rest_ = 0;     // in columns
  int64_t piece_ = 0, pieces_ = 0, per_group_ = 0, groups_ = 0;  // in channels
  int64_t channels_per_image_block_ = 0;
};

}  // namespace fastbn::cpu
