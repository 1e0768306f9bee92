// The coefficients of a backward pass that recomputes z: an Affine and a GradAffine, which share the pivot and the
// scale.
#pragma once

#include "math/affine.h"
#include "math/macros.h"

namespace fastbn {

template <class A>
struct GradCoefficients {
  Affine<A> affine;
  A slope, mean_grad, rest;

  FASTBN_INLINE GradAffine<A> grad() const { return {affine.pivot, slope, mean_grad, rest, affine.scale}; }
};

}  // namespace fastbn
