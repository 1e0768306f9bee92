// Per-channel coefficients of the normalisation and of its gradient, made once in float64 and rounded to the type that
// elements are computed in. Pivots are the rounded means; what the rounding lost is added back per channel, so that
// float32 elements with |mean| >> std keep their digits at no cost an element. No product of them leaves the range of
// that type where the result does not, as long as weight * inv_std lies in it.
#pragma once

#include "math/macros.h"
#include "math/types.h"

namespace fastbn {

// Says whether float32 differences from the mean may overflow that those from 0 do not, and from 0 they lose three
// digits at most: the data reach from one end of the range to the other. Without branches, so that loops vectorise.
FASTBN_INLINE bool spans_the_range(double mean, double inv_std) {
  const double size = mean < 0 ? -mean : mean;
  return (size > 0x1p100) & (size * inv_std < 8);
}

// Returns what elements are taken about: the rounded mean, or 0 where differences from it could overflow.
template <class A>
FASTBN_INLINE A pivot_of_elements(double mean, double inv_std) {
  if constexpr (sizeof(A) == sizeof(double)) return mean;
  return A(spans_the_range(mean, inv_std) ? 0 : mean);
}

// z = (x - pivot) * scale + shift  =  (x - mean) * inv_std * weight + bias
template <class A>
struct Affine {
  A pivot, scale, shift;

  // The mean is `mean` + `mean_rest`, the latter what rounding to float64 lost, where that is known.
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

// grad_input = (grad_z - sum_grad / n - xhat * sum_grad_xhat / n) * weight * inv_std
//            = (grad_z - mean_grad) * scale + ((x - pivot) * slope + rest)
// The difference is taken first, so that a constant grad_out cancels before it is scaled. slope has two factors
// inv_std, whose product leaves the range of float32 at 1e19, long before the gradient does. Where inv_std is that far
// from 1, it is computed as
//            = ((grad_z - mean_grad) + (x - pivot) * slope) * scale + rest
// with one factor: as many operations, but one rounding more.
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

// The multiple of about a sixteenth of a standard deviation that is nearest to the mean, of so few digits that x -
// pivot is exact for all but the least x: rounding x - mean shifts all terms of sum(grad_z * (x - mean)) alike, which
// shows where they cancel. The mean itself where that is no float32 number, and 0 as above. By bits and an addition
// that rounds, since libm's functions for it take 28 instead of 4 us for 2048 channels (EPYC 7003).
FASTBN_INLINE double grad_pivot_of(double mean, double inv_std) {
  const uint64_t bits = bit_cast<uint64_t>(32 * inv_std) & 0xfff0000000000000u;
  const double steps = bit_cast<double>(bits), step = bit_cast<double>(0x7fe0000000000000u - bits);  // powers of 2
  const double scaled = mean * steps, rounds_to_integer = 0x1.8p52;
  const double pivot = ((scaled + rounds_to_integer) - rounds_to_integer) * step;
  const double size = scaled < 0 ? -scaled : scaled, pivot_size = pivot < 0 ? -pivot : pivot;
  const double nearest = (size < 0x1p51) & (steps > 0) & (pivot_size < 0x1.fffffep127) ? pivot : mean;
  return spans_the_range(mean, inv_std) ? 0 : nearest;
}

// Says whether a channel's gradient has to be made by `apply_far`. float64 never has to, nor do channels of inf or NaN,
// whose gradient is NaN either way.
FASTBN_INLINE bool is_far_from_one(double inv_std) {
  return (inv_std > 0 && inv_std < 0x1p-20) || (inv_std > 0x1p20 && inv_std - inv_std == 0);
}

// Says whether products that vanish in float32, and are thus missing in sum(grad_z * (x - pivot)), are missed in what
// becomes of it: not where they come to less than the least normal float32.
FASTBN_INLINE bool misses_vanished_products(double inv_std) { return inv_std >= 0x1p20; }

// Returns a * b, rounded before anything is added to it: what compilers fuse it with is the 0.
FASTBN_INLINE double rounded_product(double a, double b) { return a * b + 0.0; }

// sum(grad_z * xhat) from sums about a pivot. The product is rounded as the sum is: where all x are equal, the two
// cancel.
FASTBN_INLINE double sum_grad_xhat_of(double sum_grad, double sum_grad_shifted, double pivot, double mean,
                                      double inv_std) {
  return inv_std * (sum_grad_shifted + rounded_product(pivot - mean, sum_grad));
}

}  // namespace fastbn
