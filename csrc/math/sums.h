// Two sums of a channel over some of its elements, which add up over parts of it: in forward those of d and d * d about
// the channel's pivot, in backward those of grad_z and of grad_z * (x - pivot).
#pragma once

#include "math/macros.h"

namespace fastbn {

struct alignas(16) Sums {
  double first = 0, second = 0;

  FASTBN_INLINE void add(const Sums& part) { *this = {first + part.first, second + part.second}; }
};

}  // namespace fastbn
