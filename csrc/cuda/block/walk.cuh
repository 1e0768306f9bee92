// Which octets a thread visits, in both layouts, without a division a step. A block has a slice of channels and a
// contiguous share of what lies along it; the blocks of a slice stand side by side in the grid. A channel_tiles thread
// walks the octets of one channel; a row_tiles thread stays at its octet of every row, so that each of the eight
// elements keeps its channel all the way.
#pragma once

#include <type_traits>

#include "cuda/block/loop.cuh"
#include "cuda/device/device.cuh"
#include "math/layout.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Of blocks that a multiprocessor must hold: no demand. A kernel asks for a number of them where the compiler, left
// alone, spills a word or two to hold one more.
constexpr int any_occupancy = 0;

// Reversed, a second pass over a tensor begins where the first one ended, with the lines that L2 still holds.
enum class Order { ascending, reversed };

struct Step {
  int64_t offset;  // of the octet's first element
  int count;       // its elements: 8, fewer at the end of a row or run, 0 behind the last octet
};

// aligned_: every octet is eight elements from a multiple of 16 bytes on. Then there is nothing to ask an octet for.
template <Kernel kernel, bool aligned_>
class Walk {
 public:
  static constexpr Kernel kind = kernel;
  static constexpr bool by_rows = kernel == Kernel::row_tiles;
  static constexpr bool aligned = aligned_;
  static constexpr int channels = by_rows ? vec_size : 1;  // that a thread keeps sums of

  // Holds on to layout and plan, which lie in the kernel's parameters.
  FASTBN_DEVICE Walk(const Layout& layout, const Plan& plan, int slice, int split)
      : split(split),
        first_channel(slice * plan.channels_per_tile),
        layout_(layout),
        plan_(plan),
        rows_(by_rows ? device::block_threads() / plan.vectors_per_row : device::block_threads()) {
    const int64_t behind = layout.channels - first_channel;
    tile_channels = behind < plan.channels_per_tile ? static_cast<int>(behind) : plan.channels_per_tile;

    // Threads at the same lane share the places along the slice: rows, or the octets of all runs of the channel.
    const WorkRange range(plan.work_items(layout), plan.splits, split);
    const int thread = device::thread_index();
    const int64_t begin = range.begin + thread / lanes();
    bool exists = behind > 0;
    if constexpr (by_rows) {
      index_ = slice * plan.vectors_per_row + thread % plan.vectors_per_row;
      exists = thread < rows_ * plan.vectors_per_row && index_ * vec_size < plan.row_width;
      offset_ = begin * plan.row_width + index_ * vec_size;
      stride_ = int64_t(rows_) * plan.row_width;
    }
    left_ = exists && begin < range.end ? static_cast<int>((range.end - begin + rows_ - 1) / rows_) : 0;
    if constexpr (by_rows && !aligned) {  // the last row may end before the octet, where it is several of the tensor's
      if (left_ > 0 && further(step(), left_ - 1).count == 0) --left_;
    }
    octets_ = left_;
    if (by_rows || left_ == 0) return;
    run_octets_ = static_cast<Index>(plan.vectors_per_run(layout));
    const int64_t run = begin / run_octets_ * layout.channels + slice;
    index_ = static_cast<Index>(begin % run_octets_);
    offset_ = run * layout.inner + int64_t(index_) * vec_size;
    step_index_ = static_cast<Index>(rows_ % run_octets_);
    stride_ = int64_t(rows_ / run_octets_) * layout.channels * layout.inner + int64_t(step_index_) * vec_size;
    to_next_run_ = layout.channels * layout.inner - int64_t(run_octets_) * vec_size;
  }

  FASTBN_DEVICE bool more() const { return left_ > 0; }

  // How many there are from here on, and how many there are in all.
  FASTBN_DEVICE int left() const { return left_; }
  FASTBN_DEVICE int octets() const { return octets_; }

  FASTBN_DEVICE Step step() const {
    if constexpr (aligned) return {offset_, vec_size};
    if (!more()) return {0, 0};
    if constexpr (by_rows) return row_step(offset_, index_);
    const int64_t rest = layout_.inner - int64_t(index_) * vec_size;
    return {offset_, rest < vec_size ? static_cast<int>(rest) : vec_size};
  }

  // The octet of this thread so many further on than the one of a step, of rows.
  FASTBN_DEVICE Step further(const Step& step, int octets) const {
    static_assert(by_rows);
    const int64_t offset = step.offset + octets * stride_;
    if constexpr (aligned) return {offset, step.count};
    return row_step(offset, index_);
  }

  // From an octet to the one at the same place of the slice so many further on, and whether that has one: a later slice
  // has no octet that an earlier one lacks.
  FASTBN_DEVICE int64_t distance(int slices) const {
    return by_rows ? int64_t(slices) * plan_.vectors_per_row * vec_size : slices * layout_.inner;
  }
  FASTBN_DEVICE bool reaches(int slices) const {
    return by_rows ? (index_ + slices * plan_.vectors_per_row) * vec_size < plan_.row_width
                   : first_channel + slices < layout_.channels;
  }

  // A step of this slice that was moved there, with the elements that it has.
  FASTBN_DEVICE Step ahead(const Step& moved, int slices) const {
    if constexpr (by_rows && !aligned) return row_step(moved.offset, index_ + slices * plan_.vectors_per_row);
    return moved;
  }

  FASTBN_DEVICE void next() {
    --left_;
    offset_ += stride_;
    if constexpr (!by_rows) {
      index_ += step_index_;
      if (index_ >= run_octets_) {
        index_ -= run_octets_;
        offset_ += to_next_run_;
      }
    }
  }

  // Returns how many elements of each of its channels the block visits.
  FASTBN_DEVICE int64_t elements_per_channel() const {
    const WorkRange range(plan_.work_items(layout_), plan_.splits, split);
    if constexpr (by_rows) {
      const int64_t end = range.end * plan_.fold;
      return ((end < layout_.outer ? end : layout_.outer) - range.begin * plan_.fold) * layout_.inner;
    }
    if constexpr (aligned) return (range.end - range.begin) * vec_size;
    const auto elements_before = [&](int64_t item) {
      const int64_t vectors = plan_.vectors_per_run(layout_), in_run = item % vectors * vec_size;
      return item / vectors * layout_.inner + in_run;  // only a run's last vector is shorter
    };
    return elements_before(range.end) - elements_before(range.begin);
  }

  // Calls use(i, channel) for the thread's channels, counted from the slice's first, also for those behind the last
  // one.
  template <class Use>
  FASTBN_DEVICE void for_each_channel(Use use) const {
    if constexpr (by_rows) {
      const int inner = static_cast<int>(layout_.inner), period = plan_.channels_per_tile * inner;
      const int first = device::thread_index() % plan_.vectors_per_row * vec_size % period;
      int channel = first / inner, within = first % inner;
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) {
        use(i, channel);
        if (++within < inner) continue;
        within = 0;
        if (++channel == plan_.channels_per_tile) channel = 0;
      }
    } else {
      use(0, 0);
    }
  }

  // The channel that for_each_channel gives with i, where i is no constant.
  FASTBN_DEVICE int channel_of(int i) const {
    if constexpr (!by_rows) return 0;
    return (device::thread_index() % plan_.vectors_per_row * vec_size + i) / static_cast<int>(layout_.inner) %
           plan_.channels_per_tile;
  }

  // Calls use(thread, i) for this lane's part, among `team` that share the work, of all threads' i-th sums that belong
  // to a channel of the slice.
  template <class Use>
  FASTBN_DEVICE void for_each_sum_of(int channel, int lane, int team, Use use) const {
    if constexpr (by_rows) {
      const int inner = static_cast<int>(layout_.inner), period = plan_.channels_per_tile * inner;
      const int in_a_row = plan_.vectors_per_row * vec_size / period * inner;  // elements of one channel
      // `across` lanes share a row, the others take other rows: idle lanes would leave long chains of additions.
      int across = team;
      while (across > in_a_row) across /= 2;
      for (int k = lane % across; k < in_a_row; k += across) {
        const int at = k / inner * period + channel * inner + k % inner;
        for (int row = lane / across; row < rows_; row += team / across)
          use(row * plan_.vectors_per_row + at / vec_size, at % vec_size);
      }
    } else {
      for (int thread = lane; thread < rows_; thread += team) use(thread, 0);
    }
  }

  int split;          // the block among those of its slice
  int first_channel;  // the block's first channel
  int tile_channels;  // and how many it has

 protected:
  FASTBN_DEVICE int lanes() const { return by_rows ? plan_.vectors_per_row : 1; }

  // The last row may not be whole where it is several of the tensor's.
  FASTBN_DEVICE Step row_step(int64_t offset, int index) const {
    const int64_t in_all = layout_.numel() - offset;
    const int in_row = plan_.row_width - index * vec_size;
    const int rest = in_all < in_row ? static_cast<int>(in_all) : in_row;
    return {offset, rest < 0 ? 0 : rest < vec_size ? rest : vec_size};
  }

  // A row has fewer than 2^31 elements; a run may have more octets, but then it is not of a whole walk.
  using Index = std::conditional_t<by_rows || aligned, int, int64_t>;

  const Layout& layout_;
  const Plan& plan_;
  int rows_;            // threads at one lane
  int octets_;          // of the walk
  int left_;            // of them
  Index index_ = 0;     // of the octet in its row or run
  int64_t offset_ = 0;  // of its first element
  int64_t stride_ = 0;  // from one octet to the next, in the same run
  Index run_octets_ = 0, step_index_ = 0;
  int64_t to_next_run_ = 0;  // from behind a run to the next one of the channel
};

// Whether a plan's walks are whole.
inline bool is_aligned_walk(const Plan& plan, const Layout& layout) {
  constexpr int64_t most = 1 << 30;  // a sum of two of them is an int
  return plan.vectorized && layout.outer % plan.fold == 0 &&
         (plan.kernel == Kernel::row_tiles || plan.vectors_per_run(layout) < most);
}

// The octets of a walk with the last ones, as many as the plan has slots for, first and in order, and then the others
// backwards: those that were visited last, and that a cache may hold, before the others.
template <class Walk>
class ResidentFirst : public Walk {
 public:
  FASTBN_DEVICE explicit ResidentFirst(const Walk& walk) : Walk(walk) {
    if constexpr (Walk::by_rows) {
      if (others() > 0) this->offset_ += others() * this->stride_;
    }
  }

  FASTBN_DEVICE void next() {
    Walk::next();
    if constexpr (Walk::by_rows) {
      if (this->left_ > others()) return;
      this->offset_ -= (this->left_ == others() ? this->plan_.slots + 1 : 2) * this->stride_;
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

// Octets whose loads a thread begins before it uses the first of them, with so many bytes each.
template <int64_t bytes>
constexpr int vectors_in_flight = bytes >= 64   ? 1
                                  : bytes >= 32 ? 2
                                                : 4;

// Visits every vector of the walk, `unroll` of them side by side where there are as many: calls load(step) for each,
// then wait() and use(step, item) for each, then done(how many).
template <int unroll, class Walk, class Load, class Wait, class Use, class Done>
FASTBN_DEVICE void for_each_batch(Walk walk, Load load, Wait wait, Use use, Done done) {
  using Item = decltype(load(Step{}));
  if constexpr (unroll > 1) {
    FASTBN_KEEP_LOOP
    while (walk.left() >= unroll) {
      Step steps[unroll];
      Item items[unroll];
      FASTBN_UNROLL
      for (int i = 0; i < unroll; ++i) {
        steps[i] = walk.step();
        items[i] = load(steps[i]);
        walk.next();
      }
      wait();
      FASTBN_UNROLL
      for (int i = 0; i < unroll; ++i) use(steps[i], items[i]);
      done(unroll);
    }
  }
  FASTBN_KEEP_LOOP
  while (walk.more()) {
    const Step step = walk.step();
    const Item item = load(step);
    wait();
    use(step, item);
    done(1);
    walk.next();
  }
}

// Calls use(step, load(step)) for every octet of the walk, the loads of `unroll` octets before the first use.
template <int unroll, class Walk, class Load, class Use>
FASTBN_DEVICE void for_each_vector(Walk walk, Load load, Use use) {
  for_each_batch<unroll>(walk, load, [] {}, use, [](int) {});
}

// The coefficients of a thread's channels, from those of the slice; behind the last one they mean nothing.
template <class Walk, class Coefficients>
FASTBN_DEVICE void load_coefficients(const Walk& walk, const Coefficients* shared,
                                     Coefficients (&own)[Walk::channels]) {
  walk.for_each_channel([&](int i, int channel) { own[i] = shared[channel]; });
}

// Calls use(channel of the slice, channel) for a thread's part of the slice's channels, by which all get one: the same
// part each time.
template <class Walk, class Use>
FASTBN_DEVICE void for_each_tile_channel(const Walk& walk, Use use) {
  for (int i = device::thread_index(); i < walk.tile_channels; i += device::block_threads()) {
    use(i, int64_t(walk.first_channel) + i);
  }
}

// Each is made once a block, as make(channel), and handed on in shared memory.
template <class Walk, class Coefficients, class Make>
FASTBN_DEVICE void share_coefficients(const Walk& walk, Coefficients* shared, Make make,
                                      Coefficients (&own)[Walk::channels]) {
  for_each_tile_channel(walk, [&](int i, int64_t channel) { shared[i] = make(channel); });
  device::sync_block();
  load_coefficients(walk, shared, own);
}

}  // namespace fastbn::cuda
