// Stream plans: how tiles are cut into splits and chunks, the map of shared memory, and the invariants that keep the
// blocks from waiting for one another in a circle.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/affine.h"
#include "math/layout.h"
#include "math/sums.h"
#include "math/types.h"
#include "plan/plan.h"
#include "plan/shared_memory.h"

namespace fastbn {

// The roles of a block's warps: consumers sum and write, the producer fills the ring, the preparer loads numbers per
// channel, and the finishers turn sums into coefficients. Two finishers take turns, since the exchange of one tile may
// outlast the sums of the next.
constexpr int stream_warp = 32;
constexpr int stream_consumers = 512;
constexpr int stream_consumer_warps = stream_consumers / stream_warp;
constexpr int stream_finishers = 2;
constexpr int stream_threads = stream_consumers + (2 + stream_finishers) * stream_warp;

// Returns how many vectors of each tensor a consumer loads from a chunk before it uses the first.
FASTBN_INLINE constexpr int stream_unroll(Direction direction) { return direction == Direction::forward ? 4 : 2; }

constexpr int max_ahead = 3;

// Returns the number of tiles whose messages are kept. When a block posts its sums of tile k + ahead + 1 + finishers,
// it has written tile k + finishers. So the others have posted their sums of that tile, and the finisher that did so,
// which is also that of tile k, has read all messages of tile k.
FASTBN_INLINE int message_depth(const StreamPlan& stream) { return stream.ahead + 1 + stream_finishers; }

// Two sums of a channel over the elements of one thread, or of one warp.
struct alignas(8) FloatSums {
  float first, second;
};

// What finishers need per channel beside its sums.
struct ForwardChannel {
  double weight, bias;
  float pivot;
};
struct BackwardChannel {
  double mean, inv_std, weight;
  Affine<float> affine;
  float pivot;
};

// The fields of consumers: arrays of a float per channel, so that a thread loads those of neighbouring channels at once
// and without bank conflicts. An affine map has three. Those named after sums are there before a tile is summed, the
// others before it is written.
struct ForwardFields {
  static constexpr int sum_pivot = 0, affine = 1, count = 4;
};
struct BackwardFields {
  static constexpr int sum_pivot = 0, sum_affine = 1, affine = 4, slope = 7, mean_grad = 8, rest = 9, count = 10;
};

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// The map of a block's shared memory. It has the numbers and the elements of ring_tiles tiles.
template <class Channel, class Fields>
struct StreamMap {
  SharedArray<uint64_t> full, empty;              // barriers per tile in the ring and chunk
  SharedArray<uint64_t> prepared, summed, ready;  // barriers per tile
  SharedArray<Sums> totals;                       // per finisher and channel of the tile
  SharedArray<Channel> channels;                  // per tile and channel
  SharedArray<float> fields;                      // per tile: an array per field
  SharedArray<uint32_t> is_far;                   // per tile
  SharedArray<FloatSums> partials;                // per tile: those of all threads or warps
  SharedArray<Bytes16> ring;                      // per tile in the ring, tensor and vector of the part
  int partials_per_tile, fields_per_tile;

  FASTBN_INLINE explicit StreamMap(const Plan& plan) {
    const StreamPlan& stream = plan.stream;
    const int64_t tiles = stream.ring_tiles, per_tile = plan.channels_per_tile;
    const int64_t chunks = tiles * stream.chunks_per_tile;
    full = {0, chunks};
    empty = {full.end(), chunks};
    prepared = {empty.end(), tiles};
    summed = {prepared.end(), tiles};
    ready = {summed.end(), tiles};
    totals = {align16(ready.end()), stream_finishers * per_tile};
    channels = {totals.end(), tiles * per_tile};
    partials_per_tile = partials_of(plan);
    fields_per_tile = static_cast<int>(Fields::count * per_tile);
    partials = {align16(channels.end()), tiles * partials_per_tile};
    fields = {align16(partials.end()), tiles * fields_per_tile};
    is_far = {fields.end(), tiles};
    ring = {align16(is_far.end()), tiles * stream.tensors * stream.vectors_per_split};
  }

  FASTBN_INLINE int64_t bytes() const { return ring.end(); }

 private:
  // Returns how many pairs of sums the consumers leave per tile. A thread of channel_tiles has one channel. Where
  // channels are innermost, the lanes at one vector of the row add up their sums; else a vector meets two channels.
  static FASTBN_INLINE int partials_of(const Plan& plan) {
    if (plan.kernel == Kernel::channel_tiles) return stream_consumers;
    return plan.stream.spans_runs ? 2 * stream_consumers : stream_consumer_warps * plan.channels_per_tile;
  }

  static FASTBN_INLINE int64_t align16(int64_t offset) { return (offset + 15) / 16 * 16; }
};

using ForwardMap = StreamMap<ForwardChannel, ForwardFields>;
using BackwardMap = StreamMap<BackwardChannel, BackwardFields>;

inline int64_t stream_shared_bytes(const Plan& plan, Direction direction) {
  return direction == Direction::forward ? ForwardMap(plan).bytes() : BackwardMap(plan).bytes();
}

// Returns the workspace for the messages of all groups, in bytes: per tile and channel the two sums of each split, and,
// where splits own channels, their total.
inline int64_t message_bytes(const Plan& plan) {
  constexpr int64_t message = 2 * sizeof(Bytes16);
  if (plan.splits == 1) return 0;
  return int64_t(plan.groups) * message_depth(plan.stream) * plan.channels_per_tile * (plan.splits + 1) * message;
}

// Returns whether a stream kernel can run a plan without waiting forever: consumers sum the tiles k to k + ahead before
// they free the first chunk of tile k, so the ring must hold all of them.
inline bool is_live(const StreamPlan& stream) {
  return stream.ahead >= 0 && stream.ahead <= max_ahead && stream.ahead + 1 <= stream.ring_tiles &&
         stream.ring_tiles * stream.chunks_per_tile <= stream_threads;  // each of which begins one barrier at most
}

// Sets the geometry of channel tiles that are `channels` wide, in a tensor whose rows fill vectors. Returns whether the
// kernels can walk them.
inline bool set_stream_tiles(const Request& request, Kernel kernel, int64_t channels, Plan& plan) {
  const Layout& layout = request.layout;
  const int64_t elements = 16 / element_size(request.dtype);
  const int64_t row = layout.channels * layout.inner / elements;  // of the tensor
  StreamPlan& stream = plan.stream;
  plan.schedule = Schedule::stream;
  plan.kernel = kernel;
  plan.threads = stream_threads;
  plan.vectorized = true;
  stream.spans_runs = kernel == Kernel::row_tiles && layout.inner > 1;
  plan.channels_per_tile = static_cast<int>(channels);
  plan.tiles = static_cast<int>((layout.channels + channels - 1) / channels);
  stream.row_vectors = static_cast<int>(channels * layout.inner / elements);
  stream.last_row_vectors = static_cast<int>(row - int64_t(plan.tiles - 1) * stream.row_vectors);
  const int64_t vectors = layout.outer * stream.row_vectors;
  if (row * layout.outer > INT32_MAX || stream.row_vectors == 0) return false;
  if (kernel == Kernel::row_tiles && stream.row_vectors > stream_consumers) return false;
  stream.row_stride = static_cast<uint32_t>(row);
  stream.vectors = static_cast<int>(vectors);
  stream.threads =
      kernel == Kernel::channel_tiles ? stream_consumers : stream_consumers / stream.row_vectors * stream.row_vectors;
  const auto step_of = [&](int vectors) {
    const int column = vectors % stream.row_vectors;
    return VectorStep{uint32_t(vectors / stream.row_vectors) * stream.row_stride + uint32_t(column), column};
  };
  stream.consumer_step = step_of(stream.threads);
  stream.producer_step = step_of(stream_warp);
  const bool reads_residual = request.residual && request.activation != Activation::none && !request.masked;
  stream.tensors = request.direction == Direction::forward ? 1 : 2 + reads_residual;
  stream.chunk_vectors = stream.threads * stream_unroll(request.direction);
  return true;
}

// Cuts a tile into at most `splits` parts, of whole rows (row_tiles) or whole cache lines.
inline void set_stream_splits(int64_t splits, Plan& plan) {
  StreamPlan& stream = plan.stream;
  const int64_t unit = plan.kernel == Kernel::row_tiles ? stream.row_vectors : 8;
  const int64_t units = (stream.vectors + unit - 1) / unit, each = (units + splits - 1) / splits;
  plan.splits = static_cast<int>((units + each - 1) / each);
  stream.vectors_per_split = static_cast<int>(each * unit);
  const int64_t max_vectors = std::min<int64_t>(stream.vectors_per_split, stream.vectors);
  stream.chunks_per_tile = static_cast<int>((max_vectors + stream.chunk_vectors - 1) / stream.chunk_vectors);
}

// Makes room for as many tiles as fit in `max_bytes` of shared memory, for no more than two beyond those that are
// ahead, and no more than a group has. Returns whether the ring is live.
inline bool set_ring(const Request& request, int ahead, int64_t max_bytes, Plan& plan) {
  StreamPlan& stream = plan.stream;
  const int rounds = (plan.tiles + plan.groups - 1) / plan.groups;
  stream.ahead = ahead;
  for (stream.ring_tiles = std::min(rounds, ahead + 2); is_live(stream); --stream.ring_tiles) {
    plan.shared_bytes = stream_shared_bytes(plan, request.direction);
    if (plan.shared_bytes <= max_bytes) return true;
  }
  return false;
}

}  // namespace fastbn
