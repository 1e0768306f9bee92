// Count, mean and sum of squared deviations of a channel, from sums about a pivot; and what is made of them: variance,
// inv_std, running statistics. All float64, whatever the elements were.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/macros.h"

namespace fastbn {

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;

  // From sums of d = x - pivot. Rounding of the pivot does not matter: the sums are exact about it.
  static FASTBN_INLINE Moments from_shifted(double count, double pivot, double sum, double sum_squares) {
    const double offset = sum / count;
    const double m2 = sum_squares - sum * offset;
    return {count, pivot + offset, m2 < 0 ? 0 : m2};
  }

  // Returns what rounding the mean of `from_shifted` to float64 lost. It shows in float64 elements alone.
  static FASTBN_INLINE double rest_of_mean(double count, double pivot, double sum) {
    const double offset = sum / count, mean = pivot + offset, added = mean - pivot;
    const double rest = (pivot - (mean - added)) + (offset - added);
    return rest - rest == 0 ? rest : 0;
  }

  FASTBN_INLINE double var() const { return m2 / count; }

  // n / (n - 1) of torch's running_var; 0/0 at one element, as there.
  FASTBN_INLINE double unbiased_var() const { return m2 / (count - 1); }
};

FASTBN_INLINE double inv_std_of(double var, double eps) { return 1 / ::sqrt(var + eps); }

// How much of the batch enters the running statistics: momentum, or 1/n where it is None; n is the number of batches
// this one included, 0 where they are not counted.
FASTBN_INLINE double averaging_factor(bool has_momentum, double momentum, int64_t num_batches_tracked) {
  if (has_momentum) return momentum;
  return num_batches_tracked > 0 ? 1.0 / double(num_batches_tracked) : 0.0;
}

FASTBN_INLINE double running_average(double running, double batch, double factor) {
  return (1 - factor) * running + factor * batch;
}

}  // namespace fastbn
