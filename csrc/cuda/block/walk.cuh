// The vectors that a thread visits, in both layouts, without a division per step. A block works on a tile of channels
// and on a contiguous range of the tile's work items; the blocks of a tile are neighbours in the grid. A thread of
// channel_tiles walks the vectors of one channel. A thread of row_tiles stays at the same vector of every row, so that
// each of its eight elements keeps its channel.
#pragma once

#include <type_traits>

#include "cuda/device/device.cuh"
#include "math/layout.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// The order of a pass. A reversed second pass begins where the first one ended, with the lines that L2 still holds.
enum class Order { ascending, reversed };

// The position of a vector.
struct Step {
  int64_t offset;  // of the vector's first element in the tensor
  int count;       // of its elements: 8, fewer at the end of a row or run, 0 after the last vector
};

// The vectors of one thread. `aligned`: every vector is full and 16-byte aligned, so loads need no bounds check.
template <Kernel kernel, bool aligned_>
class Walk {
 public:
  static constexpr Kernel kind = kernel;
  static constexpr bool by_rows = kernel == Kernel::row_tiles;
  static constexpr bool aligned = aligned_;
  static constexpr int channels = channels_per_thread(kernel);

  // Keeps references to layout and plan, which are parameters of the kernel.
  FASTBN_DEVICE Walk(const Layout& layout, const Plan& plan, int tile, int split)
      : split(split),
        first_channel(tile * plan.channels_per_tile),
        layout_(layout),
        plan_(plan),
        thread_rows_(by_rows ? device::block_threads() / plan.vectors_per_row : device::block_threads()) {
    const int64_t remaining = layout.channels - first_channel;
    tile_channels = remaining < plan.channels_per_tile ? static_cast<int>(remaining) : plan.channels_per_tile;

    // The threads at one vector of the row share the work items of the block, or all of its threads do (channel_tiles).
    const WorkRange range(plan, split);
    const int thread = device::thread_index();
    const int64_t begin = range.begin + thread / vectors_per_row();
    bool exists = remaining > 0;
    if constexpr (by_rows) {
      index_ = tile * plan.vectors_per_row + thread % plan.vectors_per_row;
      exists = thread < thread_rows_ * plan.vectors_per_row && index_ * vec_size < plan.row_width;
      // Opaque: the compiler would divide where they are used, when coefficients have been waited for.
      const int inner = static_cast<int>(layout.inner), column = thread % plan.vectors_per_row * vec_size;
      const int in_period = column % (plan.channels_per_tile * inner);
      channel_ = device::opaque(in_period / inner);
      within_channel_ = device::opaque(in_period % inner);
      offset_ = begin * plan.row_width + index_ * vec_size;
      stride_ = int64_t(thread_rows_) * plan.row_width;
    }
    left_ = exists && begin < range.end ? static_cast<int>((range.end - begin + thread_rows_ - 1) / thread_rows_) : 0;
    if constexpr (by_rows && !aligned) {  // a last row of several packed ones may end before this vector
      if (left_ > 0 && row_step(offset_ + (left_ - 1) * stride_, index_).count == 0) --left_;
    }
    if (by_rows || left_ == 0) return;
    vectors_per_run_ = static_cast<Index>(plan.vectors_per_run(layout));
    const int64_t run = begin / vectors_per_run_ * layout.channels + tile;
    index_ = static_cast<Index>(begin % vectors_per_run_);
    offset_ = run * layout.inner + int64_t(index_) * vec_size;
    index_step_ = static_cast<Index>(thread_rows_ % vectors_per_run_);
    stride_ =
        int64_t(thread_rows_ / vectors_per_run_) * layout.channels * layout.inner + int64_t(index_step_) * vec_size;
    to_next_run_ = layout.channels * layout.inner - int64_t(vectors_per_run_) * vec_size;
  }

  FASTBN_DEVICE bool more() const { return left_ > 0; }

  // Returns how many vectors are left.
  FASTBN_DEVICE int left() const { return left_; }

  FASTBN_DEVICE Step step() const {
    if constexpr (aligned) return {offset_, vec_size};
    if (!more()) return {0, 0};
    if constexpr (by_rows) return row_step(offset_, index_);
    const int64_t rest = layout_.inner - int64_t(index_) * vec_size;
    return {offset_, rest < vec_size ? static_cast<int>(rest) : vec_size};
  }

  FASTBN_DEVICE void next() {
    --left_;
    offset_ += stride_;
    if constexpr (!by_rows) {
      index_ += index_step_;
      if (index_ >= vectors_per_run_) {
        index_ -= vectors_per_run_;
        offset_ += to_next_run_;
      }
    }
  }

  // Returns how many elements of each of its channels the block visits.
  FASTBN_DEVICE int64_t elements_per_channel() const {
    const WorkRange range(plan_, split);
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

  // Calls use(i, channel) for the thread's channels, counted from the first of the tile, and also for those that are
  // past the last one.
  template <class Use>
  FASTBN_DEVICE void for_each_channel(Use use) const {
    if constexpr (by_rows) {
      int channel = channel_, within = within_channel_;
      FASTBN_UNROLL
      for (int i = 0; i < vec_size; ++i) {
        use(i, channel);
        if (++within < layout_.inner) continue;
        within = 0;
        if (++channel == plan_.channels_per_tile) channel = 0;
      }
    } else {
      use(0, 0);
    }
  }

  // Returns the channel that for_each_channel passes with `i`, which need not be a constant here.
  FASTBN_DEVICE int channel_of(int i) const {
    if constexpr (!by_rows) return 0;
    return (device::thread_index() % plan_.vectors_per_row * vec_size + i) / static_cast<int>(layout_.inner) %
           plan_.channels_per_tile;
  }

  // Returns how many threads' sums are left once those of the same element of a row are added up (row_tiles): a row of
  // threads, or as many of them as a warp has lanes for.
  FASTBN_DEVICE int parts() const {
    int parts = plan_.vectors_per_row;
    while (parts * 2 <= device::kWarp) parts *= 2;
    return parts;
  }

  // Calls use(thread, i) for every thread below `parts` whose i-th sum belongs to a channel of the tile. 2^bits lanes
  // share these calls.
  template <class Use>
  FASTBN_DEVICE void for_each_sum_of(int channel, int lane, int bits, int parts, Use use) const {
    if constexpr (by_rows) {
      const int inner = static_cast<int>(layout_.inner), row_width = plan_.vectors_per_row * vec_size;
      // 2^across lanes share a row of threads, and the others take other rows: idle lanes would leave long chains of
      // additions.
      int across = bits;
      while (1 << across > inner) --across;
      for (int first = channel * inner; first < row_width; first += plan_.channels_per_tile * inner) {
        for (int k = lane & ((1 << across) - 1); k < inner; k += 1 << across) {
          const int element = first + k, step = plan_.vectors_per_row << (bits - across);
          int thread = element / vec_size + (lane >> across) * plan_.vectors_per_row;
          for (; thread < parts; thread += step) use(thread, element % vec_size);
        }
      }
    } else {
      for (int thread = lane; thread < parts; thread += 1 << bits) use(thread, 0);
    }
  }

  int split;          // index of the block among those of its tile
  int first_channel;  // of the block's tile
  int tile_channels;  // channels that the tile has; the last one may have fewer than the plan says

 private:
  FASTBN_DEVICE int vectors_per_row() const { return by_rows ? plan_.vectors_per_row : 1; }

  // Returns the step at an offset, which is cut short by the end of the row or, with packed rows, of the tensor.
  FASTBN_DEVICE Step row_step(int64_t offset, int index) const {
    const int64_t in_tensor = layout_.numel() - offset;
    const int in_row = plan_.row_width - index * vec_size;
    const int rest = in_tensor < in_row ? static_cast<int>(in_tensor) : in_row;
    return {offset, rest < 0 ? 0 : rest < vec_size ? rest : vec_size};
  }

  // A row has fewer than 2^31 elements. A run may have more vectors, but then is_aligned_walk says no.
  using Index = std::conditional_t<by_rows || aligned, int, int64_t>;

  const Layout& layout_;
  const Plan& plan_;
  int thread_rows_;         // threads at the same vector of the row; for channel_tiles, all threads
  int left_;                // vectors that are left
  Index index_ = 0;         // of the vector in its row or run
  int64_t offset_ = 0;      // of its first element
  int64_t stride_ = 0;      // from one vector to the next, in the same run
  int channel_ = 0;         // of the thread's first element, counted from the first of the tile (row_tiles)
  int within_channel_ = 0;  // index of that element among the channel's in the row
  Index vectors_per_run_ = 0;
  Index index_step_ = 0;     // from one vector to the next, modulo vectors_per_run_
  int64_t to_next_run_ = 0;  // from the end of a run to the next one of the channel
};

// Returns the walk of this block where every channel tile has blocks of its own.
template <class Walk>
FASTBN_DEVICE Walk walk_of_block(const Layout& layout, const Plan& plan, Order order) {
  const int block =
      static_cast<int>(order == Order::ascending ? device::block_x() : device::grid_x() - 1 - device::block_x());
  return Walk(layout, plan, block / plan.splits, block % plan.splits);
}

}  // namespace fastbn::cuda
