// The properties of a GPU that the planner uses.
#pragma once

#include <cstdint>

namespace fastbn {

struct DeviceLimits {
  const char* name;
  int sm_count;
  int64_t shared_bytes_per_block;
  int64_t l2_bytes;
  // Device-to-device copy throughput, reads + writes. Default: H200, for drivers that do not report clocks.
  double copy_bytes_per_us = 4.3e6;
  int grid_sms = 0;           // SMs that a stream plan may occupy; 0: all
  bool has_mbarriers = true;  // the device runs code that was compiled for sm_80 or later

  int sms_of_grid() const { return grid_sms > 0 && grid_sms < sm_count ? grid_sms : sm_count; }
};

// GPUs for which plans can be explained without one. The numbers are from NVIDIA's data sheets and programming guide,
// with 7/8 of the bandwidth, which is what a copy reaches on an H200. A device of this machine is asked itself.
inline constexpr DeviceLimits known_devices[] = {
    {"a100", 108, 166912, int64_t(40) << 20, 1.36e6},
    {"h100", 132, 232448, int64_t(50) << 20, 2.93e6},
    {"h200", 132, 232448, int64_t(60) << 20, 4.3e6},
    {"b200", 148, 232448, int64_t(126) << 20, 7e6},
};

// Shared memory per block that the system reserves on top of what the block asks for, in bytes.
constexpr int64_t reserved_shared_bytes = 1024;

// Returns the limits with at most `cap` SMs for the blocks of stream plans.
inline DeviceLimits within_max_sms(DeviceLimits limits, int cap) {
  if (cap < limits.sm_count) limits.grid_sms = cap;
  return limits;
}

}  // namespace fastbn
