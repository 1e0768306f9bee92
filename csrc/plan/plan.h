// A CUDA plan: how blocks walk a tensor, and what that costs in memory traffic; and the request that it answers. Tensor
// traffic is in units of one activation tensor.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
#include "math/macros.h"
#include "math/types.h"

namespace fastbn {

enum class Direction { forward, eval, backward, frozen_backward };

// The properties of an op on which the choice of its plan depends.
struct Request {
  Layout layout;
  DType dtype = DType::float32;
  Direction direction = Direction::forward;
  Activation activation = Activation::none;
  bool residual = false;    // a residual is added before the activation
  bool masked = false;      // the activation's derivative is kept as one bit per element
  bool aligned = true;      // every pointer is a multiple of 16 bytes
  bool fused = true;        // one op computes the sums and uses them; false: channel_stats and grad_sums
  bool cooperative = true;  // the device grants cooperative launches of the size that its limits promise
};

// Elements per vector: the unit of a thread's work and of the mask, and at least one 16-byte access.
constexpr int vec_size = 8;

// Maximum threads per block, and the stride of per-thread totals in shared memory for every block size.
constexpr int max_threads = 256;

enum class Kernel {
  channel_tiles,  // NCHW-like: a tile is one channel, and a block walks its runs
  row_tiles,      // NHWC-like: a tile is some neighbouring channels, and a block walks rows of them
};

// Returns the number of channels of which a thread keeps sums.
FASTBN_INLINE constexpr int channels_per_thread(Kernel kernel) { return kernel == Kernel::row_tiles ? vec_size : 1; }

enum class Schedule {
  two_phase,  // one pass for the sums, one that finishes them, and one that reads the elements again
  stream,     // one pass: a ring on chip holds several channel tiles, so that one is read while another is written
};

// A step from one vector of a tile to another: the distance in the tensor, if both are in one row, and in the row.
struct VectorStep {
  uint32_t offset = 0;
  int column = 0;
};

// The geometry of a stream plan's channel tiles, and its ring. A row is what lies together: a run of a tile's channel
// (channel_tiles), or the tile's part of a row (row_tiles). Vectors are of 16 bytes here: 8 elements of a half type, 4
// of float32.
struct StreamPlan {
  int row_vectors = 0;                      // of a tile per row
  int last_row_vectors = 0;                 // the same of the last tile, which may be narrower (row_tiles)
  uint32_t row_stride = 0;                  // vectors from a row to the next
  int vectors = 0;                          // of a tile, over all rows
  int vectors_per_split = 0;                // of a tile; the last split may have fewer
  int threads = 0;                          // consumers with work: all, or as many as make full rows (row_tiles)
  VectorStep consumer_step, producer_step;  // over the vectors that other threads take; a column of 0: whole rows
  bool spans_runs = false;                  // a row has the runs of several channels (row_tiles)
  int tensors = 0;          // in the ring: input; or grad_out, input, and the residual where the derivative needs it
  int chunk_vectors = 0;    // of each tensor: what the producer hands over at a time
  int chunks_per_tile = 0;  // per split
  int ring_tiles = 0;       // tiles of whose parts the ring has room for
  int ahead = 0;            // tiles that are summed before the first of them is written
};

struct Plan {
  Kernel kernel = Kernel::channel_tiles;
  Schedule schedule = Schedule::two_phase;
  int threads = max_threads;  // per block

  // How blocks walk the tensor.
  int vectors_per_row = 1;    // vectors of one row that a row of threads covers (row_tiles)
  int fold = 1;               // row packing: rows of the tensor per row that is walked, to fill vectors (row_tiles)
  int row_width = 0;          // elements per row that is walked (row_tiles)
  int channels_per_tile = 1;  // channels whose sums a block has at a time
  int tiles = 1;              // channel tiles of the tensor
  int groups = 1;             // groups of blocks; each works on one channel tile
  int splits = 1;             // blocks per group, which split the work of a tile, as in split-K
  int last_splits = 1;        // the same of the last pass over the elements, which has another occupancy
  int64_t items = 0;          // work items of a tile
  int64_t items_per_split = 0;
  bool vectorized = true;  // every vector is full and 16-byte aligned
  StreamPlan stream;

  // The cost of a call; traffic is in activation tensors.
  int64_t shared_bytes = 0;  // per block, the maximum over its launches
  int launches = 1;
  double tensor_reads = 0;
  double tensor_writes = 0;

  // Returns the number of vectors per run (channel_tiles).
  FASTBN_INLINE int64_t vectors_per_run(const Layout& layout) const { return (layout.inner + vec_size - 1) / vec_size; }

  // Returns how many work items the blocks of a tile share: rows, or the vectors of all runs of a channel.
  FASTBN_INLINE int64_t work_items(const Layout& layout) const {
    return kernel == Kernel::row_tiles ? (layout.outer + fold - 1) / fold : layout.outer * vectors_per_run(layout);
  }

  // Sets the blocks per group, and what kernels would have to divide by them for.
  void set_splits(const Layout& layout, int count) {
    splits = count;
    items = work_items(layout);
    items_per_split = (items + count - 1) / count;
  }
};

// The work items [begin, end) of one of a tile's blocks; empty for blocks beyond the last item.
struct WorkRange {
  int64_t begin, end;

  FASTBN_INLINE WorkRange(const Plan& plan, int64_t split) {
    const int64_t first = split * plan.items_per_split;
    begin = first < plan.items ? first : plan.items;
    end = begin + plan.items_per_split < plan.items ? begin + plan.items_per_split : plan.items;
  }
};

}  // namespace fastbn
