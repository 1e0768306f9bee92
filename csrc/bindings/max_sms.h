// How many multiprocessors cooperative plans may count on, for the whole process: the others are left to what runs
// beside. The blocks of other plans come and go.
#pragma once

#include <atomic>
#include <limits>

#include "plan/device.h"

namespace fastbn {

inline std::atomic<int> max_sms = std::numeric_limits<int>::max();

// The blocks of a smaller grid lie one on each multiprocessor while there is a free one: two blocks are one too many.
inline DeviceLimits within_max_sms(DeviceLimits limits) {
  if (max_sms < limits.sm_count) {
    limits.grid_sms = max_sms;
    limits.max_blocks_per_sm = 1;
  }
  return limits;
}

}  // namespace fastbn
