// The cap on the SMs that cooperative plans occupy, for the whole process. It leaves the others to concurrent kernels,
// for which the blocks of other plans make room anyway.
#pragma once

#include <atomic>
#include <limits>

#include "plan/device.h"

namespace fastbn {

inline std::atomic<int> max_sms = std::numeric_limits<int>::max();

// Applies the cap. The blocks of a smaller grid go to different SMs while any is free, so plans count on one block per
// SM.
inline DeviceLimits within_max_sms(DeviceLimits limits) {
  if (max_sms < limits.sm_count) {
    limits.grid_sms = max_sms;
    limits.max_blocks_per_sm = 1;
  }
  return limits;
}

}  // namespace fastbn
