// Activations of a vector of 8: one uniform branch for all its elements.
#pragma once

#include <type_traits>

#include "cuda/block/loop.cuh"
#include "cuda/device/device.cuh"
#include "math/activation.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Calls use(a constant that equals activation), but for none, which leaves everything as it is.
template <class Use>
FASTBN_DEVICE void with_activation(Activation activation, Use use) {
  const auto with = [&]<Activation constant>() { use(std::integral_constant<Activation, constant>()); };
  switch (activation) {
    case Activation::none: break;
    case Activation::relu: with.template operator()<Activation::relu>(); break;
    case Activation::leaky_relu: with.template operator()<Activation::leaky_relu>(); break;
    case Activation::relu6: with.template operator()<Activation::relu6>(); break;
    case Activation::elu: with.template operator()<Activation::elu>(); break;
    case Activation::silu: with.template operator()<Activation::silu>(); break;
    case Activation::gelu: with.template operator()<Activation::gelu>(); break;
    case Activation::hardswish: with.template operator()<Activation::hardswish>(); break;
  }
}

// values[i] = map(constant activation, z[i], values[i]), where exp and erf take parts of the vector at a time.
template <class A, class Map>
FASTBN_DEVICE void map_activation(Activation activation, const A (&z)[vec_size], A (&values)[vec_size], Map map) {
  with_activation(activation, [&](auto constant) {
    constexpr bool is_short = is_piecewise_linear(constant.value) || constant.value == Activation::hardswish;
    constexpr int part = sizeof(A) == sizeof(double) ? 1 : is_short ? vec_size : vec_size / 2;
    FASTBN_KEEP_LOOP
    for (int first = 0; first < vec_size; first += part) {
      FASTBN_UNROLL
      for (int i = 0; i < part; ++i) {
        const A value = map(constant, pick<part>(z, first, i), pick<part>(values, first, i));
        insert<part>(values, first, i, value);
      }
    }
  });
}

// Says whether an activation is so short that loops process several vectors side by side; the others take one vector at
// a time.
FASTBN_DEVICE bool has_light_epilogue(Activation activation) {
  return activation == Activation::none || activation == Activation::relu;
}

// Calls `use(std::true_type)` or `use(std::false_type)`, by has_light_epilogue; both are instantiated.
template <class Use>
FASTBN_DEVICE void dispatch_epilogue(Activation activation, Use use) {
  has_light_epilogue(activation) ? use(std::true_type()) : use(std::false_type());
}

template <class A>
FASTBN_DEVICE void activate(Activation activation, A (&z)[vec_size]) {
  map_activation(activation, z, z, [](auto constant, A z, A) { return activation_forward(constant.value, z); });
}

template <class A>
FASTBN_DEVICE void activate_backward(Activation activation, const A (&z)[vec_size], A (&grad)[vec_size]) {
  map_activation(activation, z, grad,
                 [](auto constant, A z, A grad) { return activation_backward(constant.value, z, grad); });
}

template <class A>
FASTBN_DEVICE uint8_t mask_of(Activation activation, const A (&z)[vec_size], int count) {
  uint32_t bits = 0;
  FASTBN_UNROLL
  for (int i = 0; i < vec_size; ++i) {
    if (i < count && activation_is_upper(activation, z[i])) bits |= 1u << i;
  }
  return static_cast<uint8_t>(bits);
}

}  // namespace fastbn::cuda
