// Per-channel coefficients of the normalisation and of its gradient, computed in float64 and rounded to the type that
// elements are computed in. Pivots are the rounded means; their rounding error is corrected per channel, so that
// float32 elements with |mean| >> std keep their digits at no cost per element. No product of coefficients overflows or
// underflows unless the result does, as long as weight * inv_std is in range.
#pragma once

#include "math/macros.h"
#include "math/types.h"

namespace fastbn {

// Returns whether float32 differences from the mean could overflow where those from 0 do not: the data span the range
// of float32, and about 0 they lose at most three digits. Branch-free, so that loops vectorise.
FASTBN_INLINE bool spans_the_range(double mean, double inv_std) {
  const double size = mean < 0 ? -mean : mean;
  return (size > 0x1p100) & (size * inv_std < 8);
}

// Returns the number that is subtracted from elements: the rounded mean, or 0 if differences from it could overflow.
template <class A>
FASTBN_INLINE A pivot_of_elements(double mean, double inv_std) {
  if constexpr (sizeof(A) == sizeof(double)) return mean;
  return A(spans_the_range(mean, inv_std) ? 0 : mean);
}

// The coefficients of the normalisation:
// z = (x - pivot) * scale + shift  =  (x - mean) * inv_std * weight + bias
template <class A>
struct Affine {
  A pivot, scale, shift;

  // Computes the coefficients for the mean `mean` + `mean_rest`, where `mean_rest` is the rounding error of `mean`, if
  // known.
  static FASTBN_INLINE Affine make(double mean, double inv_std, double weight, double bias, double mean_rest = 0) {
    const A pivot = pivot_of_elements<A>(mean, inv_std);
    const double scale = weight * inv_std;
    return {pivot, A(scale), A(bias + ((double(pivot) - mean) - mean_rest) * scale)};
  }

  template <class F>
  FASTBN_INLINE F apply(F x) const {
    return (x - F(pivot)) * F(scale) + F(shift);
  }
};

// The coefficients of its gradient:
// grad_input = (grad_z - sum_grad / n - xhat * sum_grad_xhat / n) * weight * inv_std
//            = (grad_z - mean_grad) * scale + ((x - pivot) * slope + rest)
// The difference is taken first, so that a constant grad_out cancels before it is scaled. slope has the factor inv_std
// twice, whose square overflows float32 at 1e19, long before the gradient does. If inv_std is that far from 1, the
// gradient is computed as
//            = ((grad_z - mean_grad) + (x - pivot) * slope) * scale + rest
// with inv_std once in slope: as many operations, but one more rounding.
template <class A>
struct GradAffine {
  A pivot, slope, mean_grad, rest, scale;

  static FASTBN_INLINE GradAffine make(double mean, double inv_std, double weight, double sum_grad,
                                       double sum_grad_xhat, double count, bool is_far = false) {
    const A pivot = pivot_of_elements<A>(mean, inv_std);
    const double exact_mean_grad = sum_grad / count;
    const A mean_grad = A(exact_mean_grad);
    const double scale = weight * inv_std;
    const double slope = (is_far ? -1 : -scale) * inv_std * (sum_grad_xhat / count);
    const double rest =
        (double(pivot) - mean) * slope * (is_far ? scale : 1) + (double(mean_grad) - exact_mean_grad) * scale;
    return {pivot, A(slope), mean_grad, A(rest), A(scale)};
  }

  template <class F>
  FASTBN_INLINE F apply(F grad_z, F x) const {
    return (grad_z - F(mean_grad)) * F(scale) + ((x - F(pivot)) * F(slope) + F(rest));
  }
  template <class F>
  FASTBN_INLINE F apply_far(F grad_z, F x) const {
    return ((grad_z - F(mean_grad)) + (x - F(pivot)) * F(slope)) * F(scale) + F(rest);
  }
};

// Returns the multiple of about a sixteenth of a standard deviation that is nearest to the mean. It has so few digits
// that x - pivot is exact for all but the smallest x: rounding x - mean would shift all terms of sum(grad_z * (x -
// mean)) alike, which is visible where they cancel. Returns the mean itself if that is not a float32 number, and 0 as
// above. It uses bit operations and an addition that rounds, since libm's functions take 28 instead of 4 us for 2048
// channels (EPYC 7003).
FASTBN_INLINE double grad_pivot_of(double mean, double inv_std) {
  const uint64_t bits = bit_cast<uint64_t>(32 * inv_std) & 0xfff0000000000000u;
  const double steps = bit_cast<double>(bits), step = bit_cast<double>(0x7fe0000000000000u - bits);  // powers of 2
  const double scaled = mean * steps, rounds_to_integer = 0x1.8p52;
  const double pivot = ((scaled + rounds_to_integer) - rounds_to_integer) * step;
  const double size = scaled < 0 ? -scaled : scaled, pivot_size = pivot < 0 ? -pivot : pivot;
  const double nearest = (size < 0x1p51) & (steps > 0) & (pivot_size < 0x1.fffffep127) ? pivot : mean;
  return spans_the_range(mean, inv_std) ? 0 : nearest;
}

// Returns whether a channel's gradient has to be computed by `apply_far`. float64 never needs it, nor do channels with
// inf or NaN, whose gradient is NaN either way.
FASTBN_INLINE bool is_far_from_one(double inv_std) {
  return (inv_std > 0 && inv_std < 0x1p-20) || (inv_std > 0x1p20 && inv_std - inv_std == 0);
}

// Returns whether products that underflow in float32, and so are missing from sum(grad_z * (x - pivot)), would be
// visible in the result. Below this bound they contribute less than the smallest normal float32.
FASTBN_INLINE bool loses_underflowed_products(double inv_std) { return inv_std >= 0x1p20; }

// Returns a * b, rounded before anything is added to it: the compiler can fuse the product with the 0 only.
FASTBN_INLINE double rounded_product(double a, double b) { return a * b + 0.0; }

// Returns sum(grad_z * xhat) from sums about a pivot. The product is rounded like the sum, because the two cancel if
// all x are equal.
FASTBN_INLINE double sum_grad_xhat_of(double sum_grad, double sum_grad_shifted, double pivot, double mean,
                                      double inv_std) {
  return inv_std * (sum_grad_shifted + rounded_product(pivot - mean, sum_grad));
}

}  // namespace fastbn
