// Types that device.cuh and its emulation share: the shape of a launch, and the 16 bytes that one instruction moves.
#pragma once

#include <cstdint>

namespace fastbn::device {

// Grids and blocks are one-dimensional. grid_x is a multiple of cluster.
struct Launch {
  int64_t grid_x = 1;
  int threads = 256;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;
};

inline constexpr int kWarp = 32;
inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int kMaxThreads = 1024;
inline constexpr int kPortableCluster = 8;
inline constexpr int kMaxCluster = 16;

// Checks the limits of every GPU. Those of one model (shared memory, cooperative grids) are left to the launch.
inline bool is_valid(const Launch& launch) {
  return launch.grid_x >= 1 && launch.grid_x <= kMaxGridX && launch.threads >= 1 && launch.threads <= kMaxThreads &&
         launch.shared_bytes >= 0 && launch.cluster >= 1 && launch.cluster <= kMaxCluster &&
         launch.grid_x % launch.cluster == 0;
}

template <class T>
struct alignas(16) Vector16 {
  static constexpr int size = 16 / sizeof(T);
  T element[size];
};

}  // namespace fastbn::device
