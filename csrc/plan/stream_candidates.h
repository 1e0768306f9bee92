// The stream plans for a request, and the predicted time of each. The prediction serves only to choose.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/layout.h"
#include "math/types.h"
#include "plan/device.h"
#include "plan/plan.h"
#include "plan/stream.h"
#include "plan/traffic.h"

namespace fastbn {

// Constants of the prediction. No stream kernel has been timed yet: unless a comment says otherwise they come from a
// model that was fitted to other kernels on an H200 (bench/model), and times that no measurement tells are estimates.
struct StreamCost {
  double launch_us = 3.5;  // per call
  double grid_us = 1;      // from there until all blocks have started, where they must
  double load_us = 1.3;    // from a load to its data
  // From a tile's last sum to its coefficients: beside its channels, per 32 of them, and per round trip of messages
  // where the blocks of a group exchange sums. Estimates.
  double finish_us = 1.2, channels_us = 1.1, message_us = 0.8;
  double memory_factor = 1.06;                       // time per byte, relative to the SM's part of a copy
  double narrow_row_factor[3] = {1.25, 1.08, 1.03};  // of that, where rows are read in pieces of 64, 128, 256 bytes
  // Cycles that a scheduler takes for a vector of each lane, to sum it and to write it, by simulation of the machine
  // code for sm_90; of a float32 vector, which has half as many elements, float32_factor of that.
  double sum_cycles[2] = {44, 70};  // forward, backward
  double write_cycles = 70;
  double float32_factor = 0.7;
  double cycles_per_us = 1755;
};

// Runs of this many bytes and more are read one channel at a time; shorter ones several channels at a time, in rows of
// at least min_packed_row bytes. Estimates: pages of memory favour long rows.
constexpr int64_t min_run_bytes = 512;
constexpr int64_t min_packed_row = 700;

// The fewest bytes that a split is worth: estimate.
constexpr int64_t min_split_bytes = 8192;

// Returns whether stream kernels can serve a request, whatever its tiles.
inline bool can_stream(const Request& request) {
  const Layout& layout = request.layout;
  const bool reduces = request.direction == Direction::forward || request.direction == Direction::backward;
  const int64_t elements = 16 / element_size(request.dtype);
  // A mask has whole bytes per run, so that only runs of full bytes line up with vectors.
  const bool has_whole_mask = !request.masked || layout.run() % vec_size == 0;
  return reduces && request.fused && request.aligned && request.dtype != DType::float64 && has_whole_mask &&
         layout.numel() > 0 && layout.channels * layout.inner % elements == 0;
}

// Returns the time from a tile's last sum to its coefficients.
inline double finish_us_of(const Plan& plan, const StreamCost& cost) {
  const int warps = (plan.channels_per_tile + stream_warp - 1) / stream_warp;  // of channels
  double us = cost.finish_us + cost.channels_us * warps;
  if (plan.splits > 1) {
    // One channel takes one round trip. Of several, a block gathers those that it owns, and then all totals.
    const int team = std::max(1, stream_warp / std::max(1, plan.splits)),
              owned = (plan.channels_per_tile + plan.splits - 1) / plan.splits;
    us += cost.message_us * (plan.channels_per_tile == 1 ? 2 : 2 + (owned + team - 1) / team);
  }
  return us;
}

// Returns the predicted time of a stream plan, in microseconds. A round of a block, in which it sums a tile and writes
// one, takes the longest of: the memory's time for the tile; the consumers' time; half of a finisher's, since two take
// turns; the time from a tile's sums to its last store over the tiles that are in between; and the life of a chunk in
// the ring over the tiles for which it has room beyond those that are ahead.
inline double predicted_stream_us(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  constexpr StreamCost cost;
  const StreamPlan& stream = plan.stream;
  const bool backward = request.direction == Direction::backward;
  const int rounds = (plan.tiles + plan.groups - 1) / plan.groups;
  const double width = plan.tiles == 1 ? double(stream.last_row_vectors) / stream.row_vectors : 1;
  double us_per_byte = cost.memory_factor * limits.sm_count / limits.copy_bytes_per_us;
  if (plan.kernel == Kernel::row_tiles && !stream.spans_runs && plan.tiles > 1) {
    us_per_byte *= cost.narrow_row_factor[stream.row_vectors <= 4 ? 0 : stream.row_vectors <= 8 ? 1 : 2];
  }
  const double tensor_us = double(stream.vectors_per_split) * sizeof(Bytes16) * width * us_per_byte;
  const double load_us = stream.tensors * tensor_us;
  const double store_us = (plan.tensor_reads - stream.tensors + plan.tensor_writes) * tensor_us;
  constexpr int schedulers = 4;
  const double us_per_cycle = double(stream.vectors_per_split) / (stream_warp * schedulers) / cost.cycles_per_us *
                              (request.dtype == DType::float32 ? cost.float32_factor : 1);
  const double sum_us = cost.sum_cycles[backward] * us_per_cycle, write_us = cost.write_cycles * us_per_cycle;
  const double work_us = sum_us + write_us;
  const double finish_us = finish_us_of(plan, cost);
  const double life_us = cost.load_us + load_us + store_us + work_us / stream.chunks_per_tile;
  double round_us =
      std::max({load_us + store_us, work_us, finish_us / stream_finishers, (finish_us + work_us) / (stream.ahead + 1)});
  if (stream.ring_tiles < rounds) {  // else every tile has a place of its own
    round_us =
        std::max({round_us, life_us / (stream.ring_tiles - stream.ahead), (life_us + finish_us) / stream.ring_tiles});
  }
  const double start_us = cost.launch_us + std::max(cost.load_us, plan.splits > 1 ? cost.grid_us : 0);
  return start_us + load_us + sum_us / stream.chunks_per_tile + (rounds - 1) * round_us + finish_us +
         std::max(write_us, store_us);
}

// How many tiles ahead the candidates have: as many as the ring holds, or, for a measurement, any number up to that.
enum class Ahead { most, any };

// Calls use(plan) for the stream plans with channel tiles of one width: all numbers of groups that give every group the
// same number of tiles or one less.
template <class Use>
void for_each_stream_ring(const Request& request, const DeviceLimits& limits, const Plan& tiled, Ahead wanted,
                          Use use) {
  const int sms = limits.sms_of_grid();
  const int64_t tile_bytes = int64_t(tiled.stream.vectors) * 16;
  // Going down by groups meets every number of rounds once.
  for (int groups = std::min(tiled.tiles, sms); groups >= 1; --groups) {
    const int rounds = (tiled.tiles + groups - 1) / groups;
    groups = (tiled.tiles + rounds - 1) / rounds;
    const int64_t splits = request.cooperative ? std::min<int64_t>(sms / groups, tile_bytes / min_split_bytes) : 1;
    Plan plan = tiled;
    plan.groups = groups;
    set_stream_splits(std::max<int64_t>(splits, 1), plan);
    // The ring holds the tiles that are ahead, the one that is written and, if it can, one more, into which the next
    // tile is loaded meanwhile. Where the most tiles ahead leave no room for that, one less may be faster.
    int most = -1;
    for (int ahead = std::min(max_ahead, rounds - 1); ahead >= 0; --ahead) {
      if (!set_ring(request, ahead, limits.shared_bytes_per_block, plan)) continue;
      use(plan);
      most = std::max(most, ahead);
      const bool has_room = plan.stream.ring_tiles > ahead + 1 || plan.stream.ring_tiles == rounds;
      if (wanted == Ahead::most && (has_room || ahead < most)) break;
    }
    // More splits would be smaller still.
    if (splits <= 1 && !request.cooperative) return;
    if (tile_bytes / std::max(plan.splits, 1) <= min_split_bytes) return;
  }
}

// Calls use(plan) for the stream plans of a request. Their traffic is not counted yet.
template <class Use>
void for_each_stream_plan(const Request& request, const DeviceLimits& limits, const Plan& two_phase, Ahead ahead,
                          Use use) {
  if (!limits.has_mbarriers || !can_stream(request)) return;
  const Layout& layout = request.layout;
  const int64_t bytes = element_size(request.dtype), elements = 16 / bytes;
  const auto with_tiles = [&](Kernel kernel, int64_t channels) {
    Plan plan = two_phase;
    plan.fold = 1;
    if (!set_stream_tiles(request, kernel, channels, plan)) return;
    add_traffic(request, plan);
    for_each_stream_ring(request, limits, plan, ahead, use);
  };
  if (layout.channels_are_innermost()) {
    // Rows are read in pieces of at least the 64 bytes that memory hands out at a time.
    for (int64_t row_vectors : {16, 8, 4}) {
      if (layout.channels * bytes >= 64 && (row_vectors == 4 || layout.channels > row_vectors / 2 * elements)) {
        with_tiles(Kernel::row_tiles, row_vectors * elements);
      }
    }
  } else if (layout.inner % elements == 0 && layout.inner * bytes >= min_run_bytes) {
    with_tiles(Kernel::channel_tiles, 1);
  } else if (layout.inner >= elements) {  // so that a vector meets two channels at most
    int64_t channels = 1;
    while (channels * layout.inner % elements != 0) channels *= 2;
    while (channels * layout.inner * bytes < min_packed_row && channels < layout.channels) channels *= 2;
    with_tiles(Kernel::row_tiles, channels);
  }
}

}  // namespace fastbn
