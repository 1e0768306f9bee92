// The pivot about which a channel is summed: the median of five elements, spread over the channel and away from its
// ends, so that it is an outlier only if three of them are. Images are often padded, so that a single first element may
// lie far from all others. F is as in activation.h.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
#include "math/macros.h"

namespace fastbn {

constexpr int pivot_samples = 5;

// Returns the offset of sample `i` of channel 0. For channel c, c * inner is added.
FASTBN_INLINE int64_t pivot_sample(const Layout& layout, int i) {
  const int64_t outer = layout.outer * (2 * i + 1) / (2 * pivot_samples);
  const int64_t inner = layout.inner * (2 * i + 1) / (2 * pivot_samples);
  return outer * layout.channels * layout.inner + inner;
}

// Returns the sample, or 0 for inf and NaN, about which every sum would be NaN. For such a channel any finite pivot
// will do: its mean and variance are not finite either way.
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

// Returns the median of finite numbers, without the branches of a sort, half of which random data would mispredict.
template <class F>
FASTBN_INLINE F median(const F (&x)[pivot_samples]) {
  const F low = max(min(x[0], x[1]), min(x[2], x[3])), high = min(max(x[0], x[1]), max(x[2], x[3]));
  return max(min(low, high), min(max(low, high), x[4]));
}

}  // namespace fastbn
