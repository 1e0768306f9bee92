// From a thread's float sums to those of a channel: the finisher adds them up in double. A part of a tile is so small
// that a consumer's accumulators add some dozens of terms each; they need no promotion on the way.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/stream_ring.cuh"
#include "cuda/block/stream_tiles.cuh"
#include "cuda/block/vec16.cuh"
#include "math/sums.h"
#include "plan/stream.h"

namespace fastbn::cuda {

// Calls use(partial sums) for this lane's share of those that belong to a channel of the tile, where `team` lanes share
// them. `size` is that of a vector.
template <int size, class Use>
FASTBN_DEVICE void for_each_partial(const Layout& layout, const Plan& plan, const FloatSums* partials, int channel,
                                    int lane, int team, Use use) {
  if (plan.kernel == Kernel::channel_tiles) {
    for (int thread = lane; thread < stream_consumers; thread += team) use(partials[thread]);
  } else if (!plan.stream.spans_runs) {
    for (int warp = lane; warp < stream_consumer_warps; warp += team) {
      use(partials[warp * plan.channels_per_tile + channel]);
    }
  } else {
    // The channel's run lies in the vectors of these columns, of which the first may begin in the channel before.
    const int inner = static_cast<int>(layout.inner);
    const int begin = channel * inner, row_vectors = plan.stream.row_vectors;
    for (int column = begin / size + lane; column * size < begin + inner; column += team) {
      for (int thread = column; thread < plan.stream.threads; thread += row_vectors) {
        use(partials[2 * thread + (column * size < begin)]);
      }
    }
  }
}

// Sets totals[channel] to the sums of each channel of the tile over the block's part. Where resolves(channel, sums)
// says that float sums are not good enough, the whole warp calls sum_again(channel) instead. Call it in all lanes of a
// warp.
template <int size, class Resolves, class SumAgain>
FASTBN_DEVICE void add_partials(const Layout& layout, const Plan& plan, const FloatSums* partials, int channels,
                                int lane, Sums* totals, Resolves resolves, SumAgain sum_again) {
  int team = device::kWarp, log2_team = 5;
  while (team > 1 && team * channels > device::kWarp) team /= 2, --log2_team;
  const int lane_of_team = lane & (team - 1);
  for (int first = 0; first < channels; first += device::kWarp >> log2_team) {
    const int index = first + (lane >> log2_team), channel = index < channels ? index : channels - 1;
    Sums sums;
    for_each_partial<size>(layout, plan, partials, channel, lane_of_team, team,
                           [&](const FloatSums& part) { sums.add({part.first, part.second}); });
    for (int delta = team / 2; delta > 0; delta /= 2) sums.add(device::shuffle_xor(sums, delta));
    const bool leads = index < channels && lane_of_team == 0;
    if (leads) totals[channel] = sums;
    const uint32_t unresolved = device::ballot(leads && !resolves(channel, sums));
    FASTBN_KEEP_LOOP
    for (int leader = 0; unresolved != 0 && leader < device::kWarp; leader += team) {
      if ((unresolved >> leader & 1) == 0) continue;
      const int again = first + (leader >> log2_team);
      Sums exact = sum_again(again);
      for (int delta = device::kWarp / 2; delta > 0; delta /= 2) exact.add(device::shuffle_xor(exact, delta));
      if (lane == leader) totals[again] = exact;
    }
  }
  device::sync_warp();
}

// Calls use(where, offset, element) for this lane's share of the elements of a channel in the block's part of a tile:
// `where` is the vector in the ring, where the part begins at `part`, and `offset` its place in the tensor.
template <class T, class Use>
FASTBN_DEVICE void for_each_element(const Layout& layout, const Plan& plan, const StreamTiles& tiles, int tile,
                                    const Vec16* part, int channel, Use use) {
  constexpr int size = vec16_size<T>;
  const StreamPlan& stream = plan.stream;
  const bool by_rows = plan.kernel == Kernel::row_tiles;
  const int row_vectors = by_rows ? stream.row_vectors : 1, inner = by_rows ? static_cast<int>(layout.inner) : size;
  const int elements = tiles.vectors / row_vectors * inner;
  for (int i = device::thread_index() % device::kWarp; i < elements; i += device::kWarp) {
    const int in_row = (by_rows ? channel * inner : 0) + i % inner;
    const int vector = i / inner * row_vectors + in_row / size, in_tile = tiles.begin + vector;
    const int64_t offset =
        tiles.offset(tile) + int64_t(in_tile / stream.row_vectors) * stream.row_stride + in_tile % stream.row_vectors;
    use(part + vector, offset, in_row % size);
  }
}

// Returns an element of a vector in memory.
template <class T>
FASTBN_DEVICE float load_element(const Vec16* where, int element) {
  return to_acc(reinterpret_cast<const T*>(where)[element]);
}

}  // namespace fastbn::cuda
