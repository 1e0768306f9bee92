// Per-channel numbers of a tile, computed once per block and shared by its threads.
#pragma once

#include "cuda/block/walk.cuh"
#include "cuda/device/device.cuh"

namespace fastbn::cuda {

// Calls use(channel of the tile, channel of the tensor) for this thread's part of the tile's channels. The block's
// threads cover all of them, and each gets the same part every time.
template <class Walk, class Use>
FASTBN_DEVICE void for_each_tile_channel(const Walk& walk, Use use) {
  for (int i = device::thread_index(); i < walk.tile_channels; i += device::block_threads()) {
    use(i, int64_t(walk.first_channel) + i);
  }
}

// Loads the coefficients of the thread's channels from those of the tile. They are arbitrary past the last channel.
template <class Walk, class Coefficients>
FASTBN_DEVICE void load_coefficients(const Walk& walk, const Coefficients* shared,
                                     Coefficients (&thread)[Walk::channels]) {
  walk.for_each_channel([&](int i, int channel) { thread[i] = shared[channel]; });
}

// Calls make(channel) once per channel of the tile, and loads the coefficients of the thread's channels from `shared`,
// which keeps them all.
template <class Walk, class Coefficients, class Make>
FASTBN_DEVICE void share_coefficients(const Walk& walk, Coefficients* shared, Make make,
                                      Coefficients (&thread)[Walk::channels]) {
  for_each_tile_channel(walk, [&](int i, int64_t channel) { shared[i] = make(channel); });
  device::sync_block();
  load_coefficients(walk, shared, thread);
}

// Does the same in a launch that overlaps the one before it: calls make(channel, prepare(channel)), and prepare for
// most channels before it waits for that launch.
template <class Walk, class Coefficients, class Prepare, class Make>
FASTBN_DEVICE void share_coefficients_after_wait(const Walk& walk, Coefficients* shared, Prepare prepare, Make make,
                                                 Coefficients (&thread)[Walk::channels]) {
  const int first = device::thread_index();
  decltype(prepare(int64_t(0))) prepared;
  if (first < walk.tile_channels) prepared = prepare(int64_t(walk.first_channel) + first);
  device::wait_for_previous_launch();
  share_coefficients(
      walk, shared,
      [&](int64_t channel) {
        return make(channel, channel == walk.first_channel + first ? prepared : prepare(channel));
      },
      thread);
}

}  // namespace fastbn::cuda
