// The element about which the sums of a channel are taken: the median of five, spread over the channel and off its
// ends, so that it is an outlier only where three of them are. Images are often padded, and a first element alone may
// lie far from all others. F is as in activation.h.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
#include "math/macros.h"

namespace fastbn {

constexpr int pivot_samples = 5;

// Returns where sample `i` of channel 0 lies; those of channel c lie c * inner further on.
FASTBN_INLINE int64_t pivot_sample(const Layout& layout, int i) {
  const int64_t outer = layout.outer * (2 * i + 1) / (2 * pivot_samples);
  const int64_t inner = layout.inner * (2 * i + 1) / (2 * pivot_samples);
  return outer * layout.channels * layout.inner + inner;
}

// Returns the sample, or 0 for inf and NaN, about which every sum would be NaN. Which finite pivot such a channel gets
// does not matter: its mean and variance are not finite either way.
template <class F>
FASTBN_INLINE F finite_sample(F x) {
  return select(x - x <= F(0), x, F(0));
}

template <class F>
FASTBN_INLINE F min(F a, F b) {
  return select(a < b, a, b);
}
template <class F>
FASTBN_INLINE F max(F a, F b) {
  return select(a > b, a, b);
}

// Returns the median of finite numbers. A sort has branches, of which random data would take half the wrong way.
template <class F>
FASTBN_INLINE F median(const F (&x)[pivot_samples]) {
  const F low = max(min(x[0], x[1]), min(x[2], x[3])), high = min(max(x[0], x[1]), max(x[2], x[3]));
  return max(min(low, high), min(max(low, high), x[4]));
}

}  // namespace fastbn
