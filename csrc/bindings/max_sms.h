// The cap on the SMs that stream plans occupy, for the whole process. It leaves the others to concurrent kernels,
// for which the blocks of other plans make room anyway.
#pragma once

#include <atomic>
#include <limits>

namespace fastbn {

inline std::atomic<int> max_sms = std::numeric_limits<int>::max();

}  // namespace fastbn
