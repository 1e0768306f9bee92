// Activations of a vector: one uniform branch for all its elements.
#pragma once

#include <type_traits>

#include "cuda/block/loop.cuh"
#include "cuda/device/device.cuh"
#include "math/activation.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Sets values[i] to map(struct of the activation, z[i], values[i]). Long formulas take parts of the vector at a time.
template <class A, int n, class Map>
FASTBN_DEVICE void map_activation(Activation activation, const A (&z)[n], A (&values)[n], Map map) {
  with_activation(activation, [&](auto a) {
    if constexpr (a.form == Form::identity) return;
    constexpr int part = sizeof(A) == sizeof(double) ? 1 : a.form == Form::long_formula ? n / 2 : n;
    FASTBN_KEEP_LOOP
    for (int first = 0; first < n; first += part) {
      FASTBN_UNROLL
      for (int i = 0; i < part; ++i) {
        const A value = map(a, pick<part>(z, first, i), pick<part>(values, first, i));
        insert<part>(values, first, i, value);
      }
    }
  });
}

// Returns whether an activation is so short that loops process several vectors side by side; with the others they take
// one vector at a time.
FASTBN_DEVICE bool has_light_epilogue(Activation activation) {
  return activation == Activation::none || activation == Activation::relu;
}

// Calls `use(std::true_type)` or `use(std::false_type)` as has_light_epilogue says; both are instantiated.
template <class Use>
FASTBN_DEVICE void dispatch_epilogue(Activation activation, Use use) {
  has_light_epilogue(activation) ? use(std::true_type()) : use(std::false_type());
}

template <class A, int n>
FASTBN_DEVICE void activate(Activation activation, A param, A (&z)[n]) {
  map_activation(activation, z, z, [param](auto a, A z, A) { return activation_forward(a, z, param); });
}

template <class A, int n>
FASTBN_DEVICE void activate_backward(Activation activation, A param, const A (&z)[n], A (&grad)[n]) {
  map_activation(activation, z, grad, [param](auto a, A z, A grad) { return activation_backward(a, z, grad, param); });
}

template <class A, int n>
FASTBN_DEVICE uint8_t mask_of(Activation activation, const A (&z)[n], int count) {
  uint32_t bits = 0;
  FASTBN_UNROLL
  for (int i = 0; i < n; ++i) {
    if (i < count && activation_is_upper(activation, z[i])) bits |= 1u << i;
  }
  return static_cast<uint8_t>(bits);
}

}  // namespace fastbn::cuda
