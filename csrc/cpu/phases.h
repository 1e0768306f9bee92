// Runs the phases of an op over a partition: prepare, reduce, merge, finish (once per channel) and apply.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/launch.h"
#include "cpu/partition.h"
#include "cpu/workspace.h"

namespace fastbn::cpu {

// How a tile is summed: `fast` lets kernels add a few terms in float, `exact` sums in double. Where the fast sums of a
// channel lost too many digits, its tiles are summed again exactly.
enum class Precision { fast, exact };

// Minimum number of terms for float rounding to average out (an estimate).
constexpr int64_t min_count_in_float = 256;

// The sums of a reduction: partial sums per tile, and the pair of totals per channel.
class Totals {
 public:
  Totals(const Partition& partition, bool in_double)
      : partition_(partition),
        in_double_(in_double),
        partials_(size_t(2 * partition.partials())),
        totals_(size_t(2 * partition.channels())) {}

  bool in_double(Precision precision) const { return in_double_ || precision == Precision::exact; }

  // Returns where to add a tile's sums, cleared.
  ColumnSums of_tile(int64_t tile) {
    const ColumnSums sums = partition_.column_sums(tile, partials_.data());
    std::fill_n(sums.first, 2 * partition_.width(), 0.0);
    return sums;
  }

  // Adds up the partial sums of channels [begin, end). Returns false if `resolves(sums)` is false for any channel.
  // Exact sums replace the totals of those channels only.
  template <class Resolves>
  bool merge(int64_t begin, int64_t end, Precision precision, Resolves&& resolves) {
    if (precision == Precision::fast) partition_.merge(partials_.data(), begin, end, all());
    if (in_double_) return true;
    bool merged = true;
    for (int64_t c = begin; c < end; ++c) {
      if (resolves(of_channel(c))) continue;
      if (precision == Precision::exact) partition_.merge(partials_.data(), c, c + 1, all());
      merged = false;
    }
    return merged;
  }

  ConstColumnSums of_channels() const { return {totals_.data(), totals_.data() + totals_.size() / 2}; }
  Sums of_channel(int64_t c) const { return {totals_[size_t(c)], totals_[totals_.size() / 2 + size_t(c)]}; }

 private:
  ColumnSums all() { return {totals_.data(), totals_.data() + totals_.size() / 2}; }

  const Partition& partition_;
  bool in_double_;
  Workspace<double> partials_, totals_;
};

// Minimum work per thread, in elements, and in channels or additions of partial sums (estimates): less is not worth
// waking a thread for.
constexpr int64_t min_channels_per_thread = 4096;
constexpr int64_t min_elements_per_thread = 16384;

// Returns the minimum number of `tiles` per thread.
inline int64_t grain_of(const Partition& partition, int64_t tiles) {
  return std::max<int64_t>(1, min_elements_per_thread * tiles / partition.elements());
}

// Calls `apply(tile, mask, first channel)` for all elements, in memory order if the partition has one.
template <class Apply>
void run_apply(const Partition& partition, const Threads& threads, Apply&& apply) {
  if (partition.has_image_tiles()) {
    threads.for_each(partition.image_tiles(), grain_of(partition, partition.image_tiles()), [&](int64_t i) {
      apply(partition.image_tile(i), partition.image_mask_tile(i), partition.first_image_channel(i));
    });
  } else {
    threads.for_each(partition.tiles(), grain_of(partition, partition.tiles()),
                     [&](int64_t i) { partition.for_each_image_part(i, apply); });
  }
}

// Calls `finish(begin, end)` for all channels, then `apply` as above.
template <class Finish, class Apply>
void run_last_phase(const Partition& partition, const Threads& threads, Finish&& finish, Apply&& apply) {
  threads.for_each_range(partition.channels(), min_channels_per_thread, finish);
  run_apply(partition, threads, apply);
}

// Calls the reduction's `prepare(begin, end)` for channels, `reduce(tile, precision)` and `merge(begin, end,
// precision)`, then `finish` and `apply` as above. If a fast merge returns false, the tiles of those channels are
// reduced and merged again exactly. Where channels go by groups, and there are enough of them, each stays on one
// thread, which takes it through all phases while it is in cache, with the last tile first in `apply`.
template <class Reduction, class Finish, class Apply>
void run_phases(const Partition& partition, const Threads& threads, Reduction& reduction, Finish&& finish,
                Apply&& apply) {
  const int64_t grain = grain_of(partition, partition.tiles()), channels = partition.channels();
  if (partition.goes_by_group() && partition.groups() >= 4 * threads.count) {
    const int64_t tiles_per_group = partition.tiles_per_group();
    threads.for_each(partition.groups(), std::max<int64_t>(1, grain / tiles_per_group), [&](int64_t group) {
      const int64_t first = group * tiles_per_group, last = first + tiles_per_group;
      const int64_t begin = partition.first_channel(first), end = partition.end_channel(first);
      reduction.prepare(begin, end);
      for (int64_t i = first; i < last; ++i) reduction.reduce(i, Precision::fast);
      if (!reduction.merge(begin, end, Precision::fast)) {
        for (int64_t i = first; i < last; ++i) reduction.reduce(i, Precision::exact);
        reduction.merge(begin, end, Precision::exact);
      }
      finish(begin, end);
      for (int64_t i = last - 1; i >= first; --i) partition.for_each_image_part(i, apply);
    });
  } else {
    const int64_t merge_grain = std::max<int64_t>(1, min_channels_per_thread * channels / partition.partials());
    std::atomic<bool> merged = true;
    threads.for_each_range(channels, min_channels_per_thread,
                           [&](int64_t begin, int64_t end) { reduction.prepare(begin, end); });
    threads.for_each(partition.tiles(), grain, [&](int64_t i) { reduction.reduce(i, Precision::fast); });
    threads.for_each_range(channels, merge_grain, [&](int64_t begin, int64_t end) {
      if (!reduction.merge(begin, end, Precision::fast)) merged = false;
    });
    if (!merged) {
      threads.for_each(partition.tiles(), grain, [&](int64_t i) { reduction.reduce(i, Precision::exact); });
      reduction.merge(0, channels, Precision::exact);
    }
    run_last_phase(partition, threads, finish, apply);
  }
}

}  // namespace fastbn::cpu
