// Which octets a thread visits, in both layouts, without a division a step. A block has a slice of channels and a
// contiguous share of what lies along it; the blocks of a slice stand side by side in the grid. A channel_blocks thread
// walks the octets of one channel; a row_blocks thread stays at its octet of every row, so that each of the eight
// elements keeps its channel all the way.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/loop.cuh"
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
  int count;          // its elements: 8, fewer at the end of a row or run, 0 behind the last octet
};

template <Kernel kernel>
class Walk {
 public:
  static constexpr Kernel kind = kernel;
  static constexpr bool by_rows = kernel == Kernel::row_blocks;
  static constexpr int channels = by_rows ? octet : 1;  // that a thread keeps sums of

  // Holds on to layout and plan, which lie in the kernel's parameters.
  FASTBN_DEVICE Walk(const Layout& layout, const Plan& plan, int slice, int split)
      : split(split),
        slice_channel(slice * plan.slice_channels),
        layout_(layout),
        plan_(plan),
        rows_(by_rows ? device::block_threads() / plan.lanes : device::block_threads()) {
    const int64_t behind = layout.channels - slice_channel;
    slice_channels = behind < plan.slice_channels ? static_cast<int>(behind) : plan.slice_channels;

    // Threads at the same lane share the places along the slice: rows, or the octets of all runs of the channel.
    const Share share(plan.places(layout), plan.splits, split);
    const int thread = device::thread_index();
    const int64_t begin = share.begin + thread / lanes();
    bool exists = behind > 0;
    if constexpr (by_rows) {
      index_ = slice * plan.lanes + thread % plan.lanes;
      exists = thread < rows_ * plan.lanes && index_ * octet < plan.width;
      run_ = begin;
    }
    left_ = exists && begin < share.end ? static_cast<int>((share.end - begin + rows_ - 1) / rows_) : 0;
    if constexpr (by_rows) {  // the last row may end before the thread's octet, where it is several of the tensor's
      if (left_ > 0 && further(Step{offset_of(begin), 0, 0}, left_ - 1).count == 0) --left_;
    }
    octets_ = left_;
    busy_ = share.end - share.begin < rows_ ? static_cast<int>(share.end - share.begin) : rows_;
    if (by_rows || left_ == 0) return;
    run_octets_ = plan.octets(layout);
    run_ = begin / run_octets_ * layout.channels + slice;
    index_ = static_cast<Index>(begin % run_octets_);
    step_runs_ = rows_ / run_octets_ * layout.channels;
    step_index_ = rows_ % run_octets_;
  }

  FASTBN_DEVICE bool more() const { return left_ > 0; }

  // How many there are in all.
  FASTBN_DEVICE int octets() const { return octets_; }

  FASTBN_DEVICE Step step() const {
    if (!more()) return {0, 0, 0};
    if constexpr (by_rows) {
      return row_step(offset_of(run_), run_ * ((plan_.width + octet - 1) / octet) + index_, index_);
    } else {
      const int64_t first = index_ * octet, rest = layout_.inner - first;
      return {run_ * layout_.inner + first, run_ * run_octets_ + index_, rest < octet ? static_cast<int>(rest) : octet};
    }
  }

  // The octet of this thread so many further on than the one of a step, of rows.
  FASTBN_DEVICE Step further(const Step& step, int octets) const {
    static_assert(by_rows);
    return row_step(step.offset + int64_t(octets) * rows_ * plan_.width, 0, index_);
  }

  // The octet at the same place of another slice, so many further on; with no elements where there is none. A later
  // slice has no octet that an earlier one lacks.
  FASTBN_DEVICE Step ahead(const Step& step, int slices) const {
    if constexpr (by_rows) {
      const int further = slices * plan_.lanes;
      return row_step(step.offset + further * octet, 0, index_ + further);
    } else {
      return {step.offset + slices * layout_.inner, 0, slice_channel + slices < layout_.channels ? step.count : 0};
    }
  }

  FASTBN_DEVICE void next() {
    --left_;
    if constexpr (by_rows) {
      run_ += rows_;
    } else {
      run_ += step_runs_;
      index_ += step_index_;
      if (index_ >= run_octets_) {
        index_ -= run_octets_;
        run_ += layout_.channels;
      }
    }
  }

  // Calls use(i, channel, is_first) for the thread's channels, counted from the slice's first, also for those behind
  // the last one; is_first where the thread has the channel's first element in its row.
  template <class Use>
  FASTBN_DEVICE void for_each_channel(Use use) const {
    if constexpr (by_rows) {
      const int thread = device::thread_index(), first = thread % plan_.lanes * octet;
      const int inner = static_cast<int>(layout_.inner), period = plan_.slice_channels * inner;
      int channel = first % period / inner, within = first % inner;
      FASTBN_UNROLL
      for (int i = 0; i < octet; ++i) {
        use(i, channel, index_ * octet + i < plan_.width && first + i < period && within == 0);
        if (++within < inner) continue;
        within = 0;
        if (++channel == plan_.slice_channels) channel = 0;
      }
    } else {
      use(0, 0, true);
    }
  }

  // Whether the thread is the n-th of `witnesses` to its channels: the first, the middle and the last of those in a
  // block that begin with an element of them.
  static constexpr int witnesses = 3;
  FASTBN_DEVICE bool is_witness(int n) const {
    return more() && device::thread_index() / lanes() == (busy_ - 1) * n / (witnesses - 1);
  }

  // Calls use(thread, i) for this lane's part, among `team` that share the work, of all threads' i-th sums that belong
  // to a channel of the slice.
  template <class Use>
  FASTBN_DEVICE void for_each_sum_of(int channel, int lane, int team, Use use) const {
    if constexpr (by_rows) {
      const int inner = static_cast<int>(layout_.inner), period = plan_.slice_channels * inner;
      const int in_a_row = plan_.lanes * octet / period * inner;  // elements of one channel
      const bool one = in_a_row == 1;
      for (int k = one ? 0 : lane; k < in_a_row; k += one ? 1 : team) {
        const int at = k / inner * period + channel * inner + k % inner;
        for (int row = one ? lane : 0; row < rows_; row += one ? team : 1) {
          use(row * plan_.lanes + at / octet, at % octet);
        }
      }
    } else {
      for (int thread = lane; thread < rows_; thread += team) use(thread, 0);
    }
  }

  int split;           // the block among those of its slice
  int slice_channel;   // the block's first channel
  int slice_channels;  // and how many it has

 protected:
  FASTBN_DEVICE int lanes() const { return by_rows ? plan_.lanes : 1; }

  FASTBN_DEVICE int64_t offset_of(int64_t row) const { return row * plan_.width + index_ * octet; }

  // The last row may not be whole where it is several of the tensor's.
  FASTBN_DEVICE Step row_step(int64_t offset, int64_t mask_byte, int index) const {
    const int64_t in_all = layout_.numel() - offset;
    const int in_row = plan_.width - index * octet;
    const int rest = in_all < in_row ? static_cast<int>(in_all) : in_row;
    return {offset, mask_byte, rest < 0 ? 0 : rest < octet ? rest : octet};
  }

  // A row has fewer than 2^31 elements, a run may have more.
  using Index = std::conditional_t<by_rows, int, int64_t>;

  const Layout& layout_;
  const Plan& plan_;
  int rows_;         // threads at one lane
  int busy_;         // and those of them that have an octet
  int octets_;       // of the walk
  int left_;         // of them
  int64_t run_ = 0;  // or row
  Index index_ = 0;  // of the octet in it
  int64_t run_octets_ = 0, step_runs_ = 0, step_index_ = 0;
};

// The octets of a walk with the last ones, as many as the plan has slots for, first and in order, and then the others
// backwards: those that were visited last, and that a cache may hold, before the others.
template <class Walk>
class KeptFirst : public Walk {
 public:
  FASTBN_DEVICE explicit KeptFirst(const Walk& walk) : Walk(walk) {
    if constexpr (Walk::by_rows) {
      if (others() > 0) this->run_ += int64_t(others()) * this->rows_;
    }
  }

  FASTBN_DEVICE void next() {
    Walk::next();
    if constexpr (Walk::by_rows) {
      if (this->left_ > others()) return;
      this->run_ -= int64_t(this->left_ == others() ? this->plan_.slots + 1 : 2) * this->rows_;
    }
  }

 private:
  FASTBN_DEVICE int others() const { return this->octets_ - this->plan_.slots; }
};

// The walk of this block where every slice has blocks of its own.
template <class Walk>
FASTBN_DEVICE Walk walk_of_block(const Layout& layout, const Plan& plan, Order order) {
  const int block =
      static_cast<int>(order == Order::ascending ? device::block_x() : device::grid_x() - 1 - device::block_x());
  return Walk(layout, plan, block / plan.splits, block % plan.splits);
}

// Bytes that a thread loads before it uses the first of them. Estimates: a few cover the latency of memory where many
// blocks share a multiprocessor; with the one or two of a resident plan it takes more.
constexpr int few_in_flight = 32, many_in_flight = 64;

// Calls use(step, load(step, number), number) for every octet of the walk, numbered from 0, the loads of several octets
// before the first use.
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
      if (steps[i].count > 0) use(steps[i], items[i], number + i);
    }
    number += batch;
  }
}

// Calls use(step, byte, number) for every octet of the walk with its byte of the mask, 0 where there is none. The bytes
// of several octets are loaded together: waiting for each would take longer than everything else.
template <class Walk, class Use>
FASTBN_DEVICE void for_each_masked_octet(Walk walk, const uint8_t* mask, Use use) {
  constexpr int batch = 8;
  int number = 0;
  while (walk.more()) {
    uint32_t bytes[2] = {};
    if (mask) {
      Walk ahead = walk;
      FASTBN_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (ahead.more()) bytes[i / 4] |= uint32_t(mask[ahead.step().mask_byte]) << (i % 4 * 8);
        ahead.next();
      }
    }
    do {
      use(walk.step(), static_cast<uint8_t>(bytes[0]), number);
      bytes[0] = bytes[0] >> 8 | bytes[1] << 24;
      bytes[1] >>= 8;
      walk.next();
    } while (++number % batch != 0 && walk.more());
  }
}

// The coefficients of a thread's channels, from those of the slice; behind the last one they mean nothing.
template <class Walk, class Coefficients>
FASTBN_DEVICE void take_coefficients(const Walk& walk, const Coefficients* shared,
                                     Coefficients (&own)[Walk::channels]) {
  walk.for_each_channel([&](int i, int channel, bool) { own[i] = shared[channel]; });
}

// Each is made once a block, as make(channel), and handed on in shared memory.
template <class Walk, class Coefficients, class Make>
FASTBN_DEVICE void share_coefficients(const Walk& walk, void* memory, Make make, Coefficients (&own)[Walk::channels]) {
  Coefficients* shared = static_cast<Coefficients*>(memory);
  for (int i = device::thread_index(); i < walk.slice_channels; i += device::block_threads()) {
    shared[i] = make(walk.slice_channel + i);
  }
  device::sync_block();
  take_coefficients(walk, shared, own);
}

}  // namespace fastbn::cuda
