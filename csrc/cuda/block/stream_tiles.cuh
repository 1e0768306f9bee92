// What a block of a stream kernel works on: its part of the channel tiles of its group, and where each vector of a part
// lies in the tensor. Vectors are of 16 bytes. A part is a range of the tile's vectors, row by row; so is the ring.
#pragma once

#include "cuda/block/vec16.cuh"
#include "cuda/device/device.cuh"
#include "math/layout.h"
#include "plan/stream.h"

namespace fastbn::cuda {

class StreamTiles {
 public:
  // Keeps references to layout and plan, which are parameters of the kernel.
  FASTBN_DEVICE StreamTiles(const Layout& layout, const Plan& plan) : layout_(layout), plan_(plan) {
    const int block = static_cast<int>(device::block_x());
    group = block / plan.splits;
    split = block % plan.splits;
    begin = split * plan.stream.vectors_per_split;
    const int left = plan.stream.vectors - begin;
    vectors = left < plan.stream.vectors_per_split ? left : plan.stream.vectors_per_split;
  }

  // Return where a tile lies in the tensor, and its channels. The tiles of the group are group, group + groups, and so
  // on.
  FASTBN_DEVICE int64_t offset(int tile) const { return int64_t(tile) * plan_.stream.row_vectors; }
  FASTBN_DEVICE int64_t first_channel(int tile) const { return int64_t(tile) * plan_.channels_per_tile; }
  FASTBN_DEVICE int channels(int tile) const {
    const int64_t left = layout_.channels - first_channel(tile);
    return left < plan_.channels_per_tile ? static_cast<int>(left) : plan_.channels_per_tile;
  }
  // Returns the vectors that the tile has per row; those up to row_vectors do not exist.
  FASTBN_DEVICE int width(int tile) const {
    return tile == plan_.tiles - 1 ? plan_.stream.last_row_vectors : plan_.stream.row_vectors;
  }

  // Returns how many elements of each channel the part has, where vectors have `elements` of them.
  FASTBN_DEVICE double elements_per_channel(int elements) const {
    return double(vectors) * elements / plan_.channels_per_tile;
  }

  int group, split;  // of the block
  int begin;         // of the part: its first vector
  int vectors;       // of the part

 private:
  const Layout& layout_;
  const Plan& plan_;
};

// Returns the first vector of a tile, and hides where it comes from: the compiler would otherwise add up 64-bit offsets
// for each vector.
FASTBN_DEVICE Vec16* at_tile(void* tensor, int64_t offset) {
  return device::opaque_global(static_cast<Vec16*>(tensor) + offset);
}
FASTBN_DEVICE const Vec16* at_tile(const void* tensor, int64_t offset) {
  return device::opaque_global(static_cast<const Vec16*>(tensor) + offset);
}

// The vectors of a part that a thread visits, from the tile's `first` on. A walk is begun once per tile, and its
// divisions are done once per kernel.
class VectorWalk {
 public:
  // Keeps references to plan and step, which are parameters of the kernel.
  FASTBN_DEVICE VectorWalk(const StreamPlan& stream, int first, const VectorStep& step)
      : stream_(stream),
        step_(step),
        first_column_(first % stream.row_vectors),
        first_offset_(uint32_t(first / stream.row_vectors) * stream.row_stride + first_column_) {}

  FASTBN_DEVICE void restart() {
    offset = first_offset_;
    column = first_column_;
  }

  // `stays_in_column`: the step is whole rows.
  template <bool stays_in_column = false>
  FASTBN_DEVICE void next() {
    offset += step_.offset;
    if constexpr (!stays_in_column) {
      column += step_.column;
      if (column >= stream_.row_vectors) {
        column -= stream_.row_vectors;
        offset += stream_.row_stride - stream_.row_vectors;
      }
    }
  }

  uint32_t offset = 0;  // of the vector, from the tile's first
  int column = 0;       // of the vector in its row

 private:
  const StreamPlan& stream_;
  const VectorStep& step_;
  int first_column_;
  uint32_t first_offset_;
};

}  // namespace fastbn::cuda
