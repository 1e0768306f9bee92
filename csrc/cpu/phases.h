// The phases of an op over a partition: prepare and reduce, merge and finish once a channel, apply.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/launch.h"
#include "cpu/partition.h"

namespace fastbn::cpu {

// What kernels sum in float does not always resolve: then the blocks are summed again, in double.
enum class Look { first, second };

// Sums of fewer terms than this do not average out what float rounds (an estimate).
constexpr int64_t least_count_in_float = 256;

// The sums of a reduction: partial ones, block by block, then their totals, a pair a channel.
class Totals {
 public:
  Totals(const Partition& partition, bool in_double)
      : partition_(partition),
        in_double_(in_double),
        partials_(size_t(2 * partition.partials())),
        totals_(size_t(2 * partition.channels())) {}

  bool in_double(Look look) const { return in_double_ || look == Look::second; }

  // Where to add a block's sums.
  ColumnSums of_block(int64_t block, Look look) {
    const ColumnSums sums = partition_.column_sums(block, partials_.data());
    if (look == Look::second) std::fill_n(sums.first, 2 * partition_.width(), 0.0);
    return sums;
  }

  // Adds up those of channels [begin, end). No if resolves(sums) says no of any; a second look replaces just these.
  template <class Resolves>
  bool merge(int64_t begin, int64_t end, Look look, Resolves&& resolves) {
    if (look == Look::first) partition_.merge(partials_.data(), begin, end, all());
    if (in_double_) return true;
    bool merged = true;
    for (int64_t c = begin; c < end; ++c) {
      if (resolves(of_channel(c))) continue;
      if (look == Look::second) partition_.merge(partials_.data(), c, c + 1, all());
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
  std::vector<double> partials_, totals_;
};

// Below 16 Ki elements, or so many channels or additions of partial sums, a thread is not worth waking (estimates).
constexpr int64_t channels_a_thread = 4096;
inline int64_t grain_of(const Partition& partition, int64_t blocks) {
  return std::max<int64_t>(1, 16384 * blocks / partition.elements());
}

// apply(block, its mask, first channel) over all elements, in the order of memory where there is one.
template <class Apply>
void run_apply(const Partition& partition, const Threads& threads, Apply&& apply) {
  if (partition.has_image_blocks()) {
    threads.for_each(partition.image_blocks(), grain_of(partition, partition.image_blocks()), [&](int64_t i) {
      apply(partition.image_block(i), partition.image_mask_block(i), partition.first_image_channel(i));
    });
  } else {
    threads.for_each(partition.blocks(), grain_of(partition, partition.blocks()),
                     [&](int64_t i) { partition.for_each_slice(i, apply); });
  }
}

// finish(begin, end), of all channels, then apply.
template <class Finish, class Apply>
void run_last_phase(const Partition& partition, const Threads& threads, Finish&& finish, Apply&& apply) {
  threads.for_each_range(partition.channels(), channels_a_thread, finish);
  run_apply(partition, threads, apply);
}

// The reduction's prepare(begin, end), of channels, reduce(block, look) and merge(begin, end, look), then finish and
// apply as above. Where merge says no to a first look, the channels' blocks are reduced and merged again. A group of
// channels that one thread has to itself goes through all phases while it is cached, last block first.
template <class Reduction, class Finish, class Apply>
void run_phases(const Partition& partition, const Threads& threads, Reduction& reduction, Finish&& finish,
                Apply&& apply) {
  const int64_t grain = grain_of(partition, partition.blocks()), channels = partition.channels();
  if (partition.groups() >= 4 * threads.count) {
    const int64_t per_group = partition.per_group();
    threads.for_each(partition.groups(), std::max<int64_t>(1, grain / per_group), [&](int64_t group) {
      const int64_t first = group * per_group, last = first + per_group;
      const int64_t begin = partition.first_channel(first), end = partition.end_channel(first);
      reduction.prepare(begin, end);
      for (int64_t i = first; i < last; ++i) reduction.reduce(i, Look::first);
      if (!reduction.merge(begin, end, Look::first)) {
        for (int64_t i = first; i < last; ++i) reduction.reduce(i, Look::second);
        reduction.merge(begin, end, Look::second);
      }
      finish(begin, end);
      for (int64_t i = last - 1; i >= first; --i) partition.for_each_slice(i, apply);
    });
  } else {
    const int64_t merge_grain = std::max<int64_t>(1, channels_a_thread * channels / partition.partials());
    std::atomic<bool> merged = true;
    threads.for_each_range(channels, channels_a_thread,
                           [&](int64_t begin, int64_t end) { reduction.prepare(begin, end); });
    threads.for_each(partition.blocks(), grain, [&](int64_t i) { reduction.reduce(i, Look::first); });
    threads.for_each_range(channels, merge_grain, [&](int64_t begin, int64_t end) {
      if (!reduction.merge(begin, end, Look::first)) merged = false;
    });
    if (!merged) {
      threads.for_each(partition.blocks(), grain, [&](int64_t i) { reduction.reduce(i, Look::second); });
      reduction.merge(0, channels, Look::second);
    }
    run_last_phase(partition, threads, finish, apply);
  }
}

}  // namespace fastbn::cpu
