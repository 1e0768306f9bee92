// Types that device.cuh and its emulation share: the shape of a launch, the 16 bytes that one instruction moves, and a
// barrier in shared memory.
#pragma once

#include <cstdint>

namespace fastbn::device {

// Grids and blocks are one-dimensional.
struct Launch {
  int64_t grid_x = 1;
  int threads = 256;
  int64_t shared_bytes = 0;
  bool cooperative = false;
  // The launch may start before the previous one on the stream has ended, where the device can do that. Every block
  // must then call wait_for_previous_launch before it reads what that one wrote, or writes what it reads.
  bool overlaps_previous = false;
};

inline constexpr int kWarp = 32;
inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int kMaxThreads = 1024;

// Checks the limits of every GPU. Those of one model (shared memory, cooperative grids) are left to the launch.
inline bool is_valid(const Launch& launch) {
  return launch.grid_x >= 1 && launch.grid_x <= kMaxGridX && launch.threads >= 1 && launch.threads <= kMaxThreads &&
         launch.shared_bytes >= 0;
}

template <class T>
struct alignas(16) Vector16 {
  static constexpr int size = 16 / sizeof(T);
  T element[size];
};

// A barrier in shared memory on which some threads of a block arrive and others wait (PTX's mbarrier). Its phases
// follow one another: a phase completes with the last of its arrivals, and the next has the other parity. The first has
// 0.
struct alignas(8) Mbarrier {
  uint64_t state;
};

inline constexpr int kMaxArrivals = (1 << 20) - 1;

// Four words that one block stores for another to poll. Only each half is sure to arrive whole, so each needs a flag.
struct alignas(16) Message16 {
  uint32_t word[4];
};

}  // namespace fastbn::device
