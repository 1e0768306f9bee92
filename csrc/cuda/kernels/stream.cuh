// The streaming kernel of both directions: one block per SM, whose warps have roles and whose ring in shared memory
// holds several channel tiles. Tile k + ahead is summed before tile k is written, so that memory is busy while sums are
// added up, exchanged and turned into coefficients. Backward and forward are the Op, which has what differs.
#pragma once

#include "cuda/block/group_exchange.cuh"
#include "cuda/block/stream_consumer.cuh"
#include "cuda/block/stream_ring.cuh"
#include "cuda/block/stream_sums.cuh"
#include "cuda/block/stream_tiles.cuh"
#include "cuda/device/device.cuh"
#include "plan/stream.h"

namespace fastbn::cuda {

// The warps of a block.
constexpr int producer_warp = stream_consumer_warps, preparer_warp = producer_warp + 1,
              finisher_warp = producer_warp + 2;

constexpr int max_stream_tensors = 3;

// The tensors that go through the ring, in the order in which a part has them.
struct StreamTensors {
  const void* data[max_stream_tensors];
};

// The tile that a consumer sums or writes.
template <class Consumer, class Ring>
struct TileWork {
  Consumer& consumer;
  const Ring& ring;
  const RingPosition& position;
  const StreamTiles& tiles;
  int width;       // StreamTiles::width
  int64_t offset;  // StreamTiles::offset
};

// The fields of a channel of a tile.
struct FieldsOf {
  float* fields;
  int channel, stride;

  FASTBN_DEVICE float& operator[](int field) const { return fields[field * stride + channel]; }
  FASTBN_DEVICE void set_affine(int first, const Affine<float>& affine) const {
    (*this)[first] = affine.pivot;
    (*this)[first + 1] = affine.scale;
    (*this)[first + 2] = affine.shift;
  }
};

// Fills the ring. `start`, which all threads of the grid must reach, is called when the loads of the first tile are
// under way, so that they hide it.
template <int tensors, class Ring, class Start>
FASTBN_DEVICE void produce(const Plan& plan, const StreamTiles& tiles, const Ring& ring, const StreamTensors& given,
                           Start start) {
  constexpr int batch = 4;
  const StreamPlan& stream = plan.stream;
  const int lane = device::thread_index() % device::kWarp;
  VectorWalk walk(stream, tiles.begin + lane, stream.producer_step);
  RingPosition position;
  int filled = 0;
  for (int tile = tiles.group; tile < plan.tiles; tile += plan.groups) {
    const int width = tiles.width(tile);
    const Vec16* from[tensors];
    FASTBN_UNROLL
    for (int i = 0; i < tensors; ++i) from[i] = at_tile(given.data[i], tiles.offset(tile));
    if (filled++ == 1) start();
    walk.restart();
    Vec16* const to = ring.part(position);
    int vector = lane, chunk = 0;
    for (int begin = 0; begin < tiles.vectors; begin += stream.chunk_vectors) {
      device::wait(ring.empty(position, chunk), position.parity ^ 1);
      const int end = begin + stream.chunk_vectors < tiles.vectors ? begin + stream.chunk_vectors : tiles.vectors;
      if (width == stream.row_vectors) {
        // hot loop: copies
        FASTBN_KEEP_LOOP
        for (; vector + (batch - 1) * device::kWarp < end; vector += batch * device::kWarp) {
          uint32_t offset[batch];
          FASTBN_UNROLL
          for (int u = 0; u < batch; ++u) {
            offset[u] = walk.offset;
            walk.next();
          }
          FASTBN_UNROLL
          for (int i = 0; i < tensors; ++i) {
            FASTBN_UNROLL
            for (int u = 0; u < batch; ++u) {
              device::copy_async16(to + i * stream.vectors_per_split + vector + u * device::kWarp, from[i] + offset[u]);
            }
          }
        }
        // end of hot loop
      }
      FASTBN_KEEP_LOOP
      for (; vector < end; vector += device::kWarp) {
        if (walk.column < width) {
          FASTBN_UNROLL
          for (int i = 0; i < tensors; ++i) {
            device::copy_async16(to + i * stream.vectors_per_split + vector, from[i] + walk.offset);
          }
        }
        walk.next();
      }
      device::arrive_after_copies(ring.full(position, chunk++));
    }
    position.next(stream.ring_tiles);
  }
  if (filled <= 1) start();
  device::wait_for_copies();  // a thread must not exit before they have landed
}

// Loads the numbers that a tile has per channel before its elements are summed; those of the first tile before `start`.
template <class Op, class Ring, class Start>
FASTBN_DEVICE void prepare(const Op& op, const Plan& plan, const StreamTiles& tiles, const Ring& ring, Start start) {
  const int lane = device::thread_index() % device::kWarp;
  RingPosition position;
  for (int tile = tiles.group; tile < plan.tiles; tile += plan.groups, position.next(plan.stream.ring_tiles)) {
    if (tile >= plan.stream.ring_tiles * plan.groups) ring.wait_free(position);
    const int channels = tiles.channels(tile);
    for (int channel = lane; channel < channels; channel += device::kWarp) {
      ring.channels(position)[channel] = op.prepare(tiles.first_channel(tile) + channel,
                                                    FieldsOf{ring.fields(position), channel, plan.channels_per_tile});
    }
    device::sync_warp();
    if (lane == 0) ring.arrive_prepared(position);
    if (tile == tiles.group) start();
  }
  if (tiles.group >= plan.tiles) start();
}

// Turns sums into coefficients, and writes the results per channel after the consumers have got theirs.
template <class Op, class Ring>
FASTBN_DEVICE void finish(const Op& op, const Layout& layout, const Plan& plan, const StreamTiles& tiles,
                          const Ring& ring, const GroupExchange& exchange) {
  const int lane = device::thread_index() % device::kWarp;
  const int turn = device::thread_index() / device::kWarp - finisher_warp;
  // A ring of one tile has one barrier for all tiles, whose phases only one finisher can tell apart.
  const int finishers = plan.stream.ring_tiles < stream_finishers ? plan.stream.ring_tiles : stream_finishers;
  if (turn >= finishers) return;
  Sums* const totals = ring.totals(turn);
  RingPosition next_position, next_message;
  uint32_t k = 0;
  for (int tile = tiles.group; tile < plan.tiles; tile += plan.groups) {
    // Each finisher passes over the tiles of the other.
    const RingPosition position = next_position, message = next_message;
    next_position.next(plan.stream.ring_tiles);
    next_message.next(message_depth(plan.stream));
    if (int(k++ % uint32_t(finishers)) != turn) continue;
    const int channels = tiles.channels(tile);
    const int64_t first_channel = tiles.first_channel(tile);
    ring.wait_summed(position);
    auto* const prepared = ring.channels(position);
    bool is_far = false;
    for (int channel = lane; channel < channels; channel += device::kWarp) {
      is_far = is_far || op.is_far(prepared[channel]);
    }
    is_far = device::ballot(is_far) != 0;
    add_partials<Op::size>(
        layout, plan, ring.partials(position), channels, lane, totals,
        [&](int channel, const Sums& sums) {
          return op.resolves(prepared[channel], sums, tiles.elements_per_channel(Op::size));
        },
        [&](int channel) { return op.sum_in_double(tiles, tile, ring.part(position), channel, prepared[channel]); });
    if (plan.splits > 1) exchange.all_reduce(k, message.slot, totals, channels, lane);
    for (int channel = lane; channel < channels; channel += device::kWarp) {
      op.finish(prepared[channel], is_far, totals[channel],
                FieldsOf{ring.fields(position), channel, plan.channels_per_tile});
    }
    if (lane == 0) ring.is_far(position) = is_far;
    device::sync_warp();
    if (lane == 0) ring.arrive_ready(position);
    // The blocks of the group share the channels whose results are to be written.
    for (int channel = tiles.split + lane * plan.splits; channel < channels; channel += device::kWarp * plan.splits) {
      op.save(first_channel + channel, totals[channel]);
    }
    device::sync_warp();
  }
}

template <class Op>
device::Launch stream_shape(const typename Op::Params& params, const Plan& plan) {
  device::Launch shape;
  shape.grid_x = int64_t(plan.groups) * plan.splits;
  shape.threads = plan.threads;
  shape.cooperative = Op::is_cooperative(params, plan);
  shape.shared_bytes = plan.shared_bytes;
  return shape;
}

// Runs a block. `params`, `plan` and `map` are parameters of the kernel.
template <class Op>
FASTBN_DEVICE void run_stream(const typename Op::Params& params, const Plan& plan, const typename Op::Map& map,
                              device::Message16* messages) {
  const StreamTiles tiles(params.layout, plan);
  const StreamRing<typename Op::Map> ring(plan, map);
  const GroupExchange exchange(plan, messages, tiles.group, tiles.split);
  const Op op(params, plan);
  const bool meets_grid = Op::is_cooperative(params, plan);
  ring.init_barriers();
  if (plan.splits > 1) exchange.clear(device::thread_index(), stream_threads);
  device::sync_block();
  const auto start = [&] {
    if (meets_grid) device::sync_grid();
  };

  const int warp = device::thread_index() / device::kWarp;
  if (warp == producer_warp) {
    constexpr int min_tensors = Op::min_tensors;
    if (min_tensors == 1 || plan.stream.tensors == min_tensors) {
      produce<min_tensors>(plan, tiles, ring, op.tensors(), start);
    } else {
      produce<max_stream_tensors>(plan, tiles, ring, op.tensors(), start);
    }
    return;
  }
  if (warp == preparer_warp) {
    prepare(op, plan, tiles, ring, start);
  } else if (warp >= finisher_warp) {
    start();
    op.count_batch();
    finish(op, params.layout, plan, tiles, ring, exchange);
  } else {
    start();
    typename Op::Consumer consumer(params.layout, plan, tiles, ring);
    const auto work_of = [&](int tile, const RingPosition& position) {
      return TileWork<typename Op::Consumer, decltype(ring)>{
          consumer, ring, position, tiles, tiles.width(tile), tiles.offset(tile)};
    };
    RingPosition sums, writes;
    const int ahead = plan.stream.ahead * plan.groups;
    for (int tile = tiles.group - ahead; tile < plan.tiles; tile += plan.groups) {
      if (tile + ahead < plan.tiles) {
        ring.wait_prepared(sums);
        op.sum_tile(work_of(tile + ahead, sums));
        sums.next(plan.stream.ring_tiles);
      }
      if (tile >= 0) {
        ring.wait_ready(writes);
        op.write_tile(work_of(tile, writes));
        writes.next(plan.stream.ring_tiles);
      }
    }
  }
}

}  // namespace fastbn::cuda
