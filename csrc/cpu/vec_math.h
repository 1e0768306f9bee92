// exp, expm1 and erf of vectors, under the names by which csrc/math asks for them: libm's, lane by lane.
#pragma once

#include <cstring>

#include "cpu/vec.h"

namespace fastbn::cpu::FASTBN_ISA {

template <class A, class Function>
FASTBN_INLINE Vec<A> map_lanes(Vec<A> x, Function function) {
  A lane[Vec<A>::lanes];
  std::memcpy(lane, &x.native, sizeof(lane));
  for (A& value : lane) value = function(value);
  std::memcpy(&x.native, lane, sizeof(lane));
  return x;
}
template <class A>
FASTBN_INLINE Vec<A> exp(Vec<A> x) {
  return map_lanes(x, [](A value) { return fastbn::exp(value); });
}
template <class A>
FASTBN_INLINE Vec<A> expm1(Vec<A> x) {
  return map_lanes(x, [](A value) { return fastbn::expm1(value); });
}
template <class A>
FASTBN_INLINE Vec<A> erf(Vec<A> x) {
  return map_lanes(x, [](A value) { return fastbn::erf(value); });
}

}  // namespace fastbn::cpu::FASTBN_ISA
