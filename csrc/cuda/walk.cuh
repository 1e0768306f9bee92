// Which octets a thread visits, in both layouts, without a division a step. A block has a slice of channels (one
// channel, or `lanes` octets of them) and a contiguous share of what lies along it: the blocks of a slice are a
// cluster, side by side in grid x, or stand along grid y. A thread keeps its channels all the way: one
// (channel_blocks), or the eight of its octet (row_blocks).
#pragma once

#include "cuda/device.cuh"
#include "math/layout.h"
#include "math/plan.h"

namespace fastbn::cuda {

// Of blocks that a multiprocessor must hold: no demand. A kernel asks for a number of them where the compiler, left
// alone, spills a word or two to hold one more.
constexpr int least_blocks = 0;

// Reversed, a second pass over a tensor begins where the first one ended, with the lines that L2 still holds.
enum class Order { ascending, reversed };

struct Step {
  int64_t offset;     // of the octet's first element
  int64_t mask_byte;  // of the octet's byte in the mask
  int count;          // its elements: 8, fewer at the end of a run, 0 behind the last octet
};

template <Kernel kernel>
class Walk {
 public:
  static constexpr bool by_rows = kernel == Kernel::row_blocks;
  static constexpr int channels = by_rows ? octet : 1;

  FASTBN_DEVICE Walk(const Layout& layout, const Plan& plan, Order order)
      : lanes(by_rows ? plan.lanes : 1),
        split(split_of(plan, order)),
        run_length_(layout.run()),
        octets_(layout.mask_bytes_per_run()) {
    const int64_t block = order == Order::ascending ? device::block_x() : device::grid_x() - 1 - device::block_x();
    const int64_t slice = block / plan.cluster;
    const int64_t thread = device::thread_index();
    slice_channel = slice * lanes * channels;
    channel = slice_channel + thread % lanes * channels;
    const int64_t behind = layout.channels - channel;
    live = behind <= 0 ? 0 : behind < channels ? static_cast<int>(behind) : channels;

    // Threads at the same lane share the places along the slice: rows, or the octets of all runs of the channel.
    const int64_t stride = device::block_threads() / lanes;
    const int64_t places = by_rows ? layout.outer : layout.outer * octets_;
    const int64_t share = (places + plan.splits - 1) / plan.splits;
    const int64_t begin = split * share + thread / lanes;
    const int64_t end = split * share + share < places ? split * share + share : places;
    left_ = live > 0 && begin < end ? (end - begin + stride - 1) / stride : 0;
    if constexpr (by_rows) {
      run_ = begin;
      index_ = channel / octet;
      step_runs_ = stride;
    } else if (left_ > 0) {
      run_ = begin / octets_ * layout.channels + channel;
      index_ = begin % octets_;
      step_runs_ = stride / octets_ * layout.channels;
      step_index_ = stride % octets_;
      wrap_runs_ = layout.channels;
    }
  }

  FASTBN_DEVICE bool more() const { return left_ > 0; }

  FASTBN_DEVICE Step step() const {
    if (!more()) return {0, 0, 0};
    const int64_t first = index_ * octet;
    const int64_t rest = run_length_ - first;
    return {run_ * run_length_ + first, run_ * octets_ + index_, rest < octet ? static_cast<int>(rest) : octet};
  }

  FASTBN_DEVICE void next() {
    --left_;
    run_ += step_runs_;
    if constexpr (!by_rows) {
      index_ += step_index_;
      if (index_ >= octets_) {
        index_ -= octets_;
        run_ += wrap_runs_;
      }
    }
  }

  int lanes;
  int live;  // how many of this thread's channels exist
  int64_t split;
  int64_t slice_channel;  // the block's first channel
  int64_t channel;        // the thread's first channel

 private:
  static FASTBN_DEVICE int64_t split_of(const Plan& plan, Order order) {
    if (plan.cluster > 1) return device::cluster_rank();
    return order == Order::ascending ? device::block_y() : device::grid_y() - 1 - device::block_y();
  }

  int64_t run_length_, octets_;
  int64_t left_;
  int64_t run_ = 0, index_ = 0, step_runs_ = 0, step_index_ = 0, wrap_runs_ = 0;
};

// Bytes that a thread loads before it uses the first of them. Estimates: a few cover the latency of memory where many
// blocks share a multiprocessor; with the one or two of a resident plan it takes more.
constexpr int few_in_flight = 32, many_in_flight = 64;

// Calls use(step, load(step, number)) for every octet of the walk, numbered from 0, the loads of several octets before
// the first use.
template <int bytes_in_flight = few_in_flight, class Walk, class Load, class Use>
FASTBN_DEVICE void for_each_octet(Walk walk, Load load, Use use) {
  using Item = decltype(load(Step{}, 0));
  constexpr int size = static_cast<int>(sizeof(Item));
  constexpr int batch = size < bytes_in_flight ? bytes_in_flight / size : 1;
  int number = 0;
  while (walk.more()) {
    Step steps[batch];
    Item items[batch] = {};
    FASTBN_UNROLL
    for (int i = 0; i < batch; ++i) {
      steps[i] = walk.step();
      if (steps[i].count > 0) items[i] = load(steps[i], number + i);
      walk.next();
    }
    FASTBN_UNROLL
    for (int i = 0; i < batch; ++i) {
      if (steps[i].count > 0) use(steps[i], items[i]);
    }
    number += batch;
  }
}

// The coefficients of a thread's channels. Each is made once a block, as make(channel), and handed on in the
// shared scratch.
template <class Walk, class Coefficients, class Make>
FASTBN_DEVICE void share_coefficients(const Walk& walk, int64_t all_channels, void* scratch, Make make,
                                      Coefficients (&own)[Walk::channels]) {
  Coefficients* shared = static_cast<Coefficients*>(scratch);
  for (int i = device::thread_index(); i < walk.lanes * Walk::channels; i += device::block_threads()) {
    if (walk.slice_channel + i < all_channels) shared[i] = make(walk.slice_channel + i);
  }
  device::sync_block();
  FASTBN_UNROLL
  for (int i = 0; i < Walk::channels; ++i) {
    own[i] = i < walk.live ? shared[walk.channel - walk.slice_channel + i] : Coefficients{};
  }
}

}  // namespace fastbn::cuda
