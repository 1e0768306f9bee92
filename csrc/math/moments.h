// Count, mean and sum of squared deviations of a channel, from sums about a pivot; and the variance, inv_std and
// running statistics derived from them. All are float64, whatever the element type.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/macros.h"

namespace fastbn {

// Returns the rounding error of `sum`, which is a + b rounded (Knuth's two-sum). It is NaN where the sum is not finite.
template <class F>
FASTBN_INLINE F rest_of_sum(F a, F b, F sum) {
  const F added = sum - a;
  return (a - (sum - added)) + (b - added);
}

// The moments of one channel: count, mean, and m2, the sum of squared deviations from the mean.
struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;

  // Computes the moments from sums of d = x - pivot. The rounding of the pivot does not matter, since the sums are
  // exactly about the rounded one.
  static FASTBN_INLINE Moments from_shifted(double count, double pivot, double sum, double sum_squares) {
    const double offset = sum / count;
    const double m2 = sum_squares - sum * offset;
    return {count, pivot + offset, m2 < 0 ? 0 : m2};
  }

  // Returns the rounding error of the mean of `from_shifted`, which is visible only with float64 elements.
  static FASTBN_INLINE double rest_of_mean(double count, double pivot, double sum) {
    const double offset = sum / count, rest = rest_of_sum(pivot, offset, pivot + offset);
    return rest - rest == 0 ? rest : 0;
  }

  FASTBN_INLINE double var() const { return m2 / count; }

  // Returns the variance with Bessel's correction, as in torch's running_var; 0/0 for one element, as there.
  FASTBN_INLINE double unbiased_var() const { return m2 / (count - 1); }
};

// Returns the reciprocal of the standard deviation.
FASTBN_INLINE double inv_std_of(double var, double eps) { return 1 / ::sqrt(var + eps); }

// Returns the weight of the batch in the running statistics: `momentum`, or 1/n if it is None. `num_batches_tracked` is
// n, the number of batches including this one, or 0 if they are not counted.
FASTBN_INLINE double averaging_factor(bool has_momentum, double momentum, int64_t num_batches_tracked) {
  if (has_momentum) return momentum;
  return num_batches_tracked > 0 ? 1.0 / double(num_batches_tracked) : 0.0;
}

// Returns the updated running statistic.
FASTBN_INLINE double running_average(double running, double batch, double factor) {
  return (1 - factor) * running + factor * batch;
}

}  // namespace fastbn
