// The activations, one struct each, with torch's branches at the boundaries, and at NaN those of its vectorised loops
// for CPUs: comparisons are written so that a NaN takes the branch that is meant for it. F is float, double, or a
// vector of either that has the same operators and `select`, `exp`, `expm1`, `log1p` of [0, 1], `erf`.
#pragma once

#include <cmath>

#include "math/macros.h"

namespace fastbn {

// The order is the contract: it is the `activation` argument of every op.
enum class Activation : int {
  none,
  relu,
  leaky_relu,
  relu6,
  elu,
  silu,
  gelu,
  hardswish,
  hardsigmoid,
  mish,
  softplus,
  sigmoid,
  tanh
};

// The kind of formula, by which loops specialise. The derivative of a piecewise linear one has two values, so one bit
// per element determines it; a short one takes a few operations, a long one exp or erf.
enum class Form { identity, piecewise_linear, short_formula, long_formula };

template <class F>
FASTBN_INLINE F select(bool condition, F yes, F no) {
  return condition ? yes : no;
}
FASTBN_INLINE float exp(float x) { return ::expf(x); }
FASTBN_INLINE double exp(double x) { return ::exp(x); }
FASTBN_INLINE float expm1(float x) { return ::expm1f(x); }
FASTBN_INLINE double expm1(double x) { return ::expm1(x); }
FASTBN_INLINE float erf(float x) { return ::erff(x); }
FASTBN_INLINE double erf(double x) { return ::erf(x); }

FASTBN_INLINE float log1p(float x) { return ::log1pf(x); }
FASTBN_INLINE double log1p(double x) { return ::log1p(x); }

// Returns exp(-|z|), which does not overflow.
template <class F>
FASTBN_INLINE F exp_of_minus_magnitude(F z) {
  return exp(select(z > F(0), -z, z));
}

template <class F>
FASTBN_INLINE F sigmoid(F z) {
  const F p = exp_of_minus_magnitude(z);
  return select(z > F(0), F(1), p) / (F(1) + p);
}

// Returns Phi(z), the normal distribution function.
template <class F>
FASTBN_INLINE F normal_cdf(F z) {
  return F(0.5) * (F(1) + erf(z * F(0.70710678118654752440)));
}

// Each struct has `forward`, activation(z), and `backward`, grad_out * activation'(z). A piecewise linear one has
// `is_upper` and `leaks` instead of `backward`: where its derivative is 1, and whether it is the parameter elsewhere,
// or 0. The last argument is the activation's parameter, of those that have one.
template <Activation id_, Form form_>
struct ActivationOf {
  static constexpr Activation id = id_;
  static constexpr Form form = form_;
  static constexpr bool has_param = false;
};

struct None : ActivationOf<Activation::none, Form::identity> {
  static constexpr const char* name = "none";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return z;
  }
  template <class F>
  static FASTBN_INLINE F backward(F, F grad_out, F) {
    return grad_out;
  }
};

template <Activation id>
struct PiecewiseLinear : ActivationOf<id, Form::piecewise_linear> {};

// relu leaves -0 as it is, as torch's does on a CPU. (CUDA's loops for relu make it +0.)
struct Relu : PiecewiseLinear<Activation::relu> {
  static constexpr const char* name = "relu";
  static constexpr bool leaks = false;
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return select(z < F(0), F(0), z);
  }
  template <class F>
  static FASTBN_INLINE auto is_upper(F z) {
    return !(z <= F(0));
  }
};

struct LeakyRelu : PiecewiseLinear<Activation::leaky_relu> {
  static constexpr const char* name = "leaky_relu";
  static constexpr bool leaks = true, has_param = true;
  static constexpr double default_param = 0.01;  // the slope below 0
  template <class F>
  static FASTBN_INLINE F forward(F z, F slope) {
    return select(z > F(0), z, z * slope);
  }
  template <class F>
  static FASTBN_INLINE auto is_upper(F z) {
    return z > F(0);
  }
};

struct Relu6 : PiecewiseLinear<Activation::relu6> {
  static constexpr const char* name = "relu6";
  static constexpr bool leaks = false;
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return select(z <= F(0), F(0), select(z >= F(6), F(6), z));
  }
  template <class F>
  static FASTBN_INLINE auto is_upper(F z) -> decltype(z > F(0)) {
    return (z > F(0)) & (z < F(6));
  }
};

struct Elu : ActivationOf<Activation::elu, Form::long_formula> {
  static constexpr const char* name = "elu";
  static constexpr bool has_param = true;
  static constexpr double default_param = 1;  // alpha
  template <class F>
  static FASTBN_INLINE F forward(F z, F alpha) {
    return select(z <= F(0), expm1(z) * alpha, z);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F alpha) {
    return select(z > F(0), grad_out, grad_out * (exp(z) * alpha));
  }
};

struct Silu : ActivationOf<Activation::silu, Form::long_formula> {
  static constexpr const char* name = "silu";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return z / (F(1) + exp(-z));
  }
  // 1 - s cancels where s is nearly 1; e * s is the same without cancellation.
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    const F e = exp(-z), s = F(1) / (F(1) + e);
    return grad_out * (s * (F(1) + z * select(z > F(0), e * s, F(1) - s)));
  }
};

struct Gelu : ActivationOf<Activation::gelu, Form::long_formula> {
  static constexpr const char* name = "gelu";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return z * normal_cdf(z);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    const F density = exp(z * z * F(-0.5)) * F(0.39894228040143267794);
    return grad_out * (normal_cdf(z) + z * density);
  }
};

struct Hardswish : ActivationOf<Activation::hardswish, Form::short_formula> {
  static constexpr const char* name = "hardswish";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    const F ramp = z + F(3);
    return z * select(ramp <= F(0), F(0), select(ramp >= F(6), F(6), ramp)) / F(6);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    return select(z <= F(-3), F(0), select(z >= F(3), grad_out, grad_out * (z * F(1.0 / 3) + F(0.5))));
  }
};

// hardsigmoid's derivative has two values, but neither is 1, and a mask of its own is not worth a copy of every loop.
struct Hardsigmoid : ActivationOf<Activation::hardsigmoid, Form::short_formula> {
  static constexpr const char* name = "hardsigmoid";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    const F ramp = z + F(3);
    return select(ramp <= F(0), F(0), select(ramp >= F(6), F(6), ramp)) / F(6);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    return select((z > F(-3)) & (z < F(3)), grad_out * F(1.0 / 6), F(0));
  }
};

// mish is z * tanh(softplus(z)).
struct Mish : ActivationOf<Activation::mish, Form::long_formula> {
  static constexpr const char* name = "mish";

  // tanh(softplus(z)) as numerator / denominator, from p = exp(-|z|), which neither overflows nor cancels.
  template <class F>
  struct Ratio {
    F numerator, denominator;

    FASTBN_INLINE Ratio(F z, F p) {
      const F negative = p * (p + F(2));  // the numerator where z <= 0
      numerator = select(z > F(0), F(1) + (p + p), negative);
      denominator = select(z > F(0), numerator + (p + p) * p, negative + F(2));
    }
  };

  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    const Ratio<F> ratio(z, exp_of_minus_magnitude(z));
    return z * (ratio.numerator / ratio.denominator);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    const F p = exp_of_minus_magnitude(z);
    const Ratio<F> ratio(z, p);
    const F inverse = F(1) / ratio.denominator;
    const F slope = F(4) * (select(z > F(0), p * p, p) * (F(1) + p)) * (inverse * inverse);  // of the tanh
    return grad_out * (ratio.numerator * inverse + z * slope);
  }
};

// softplus is z itself above 20, as torch's is.
struct Softplus : ActivationOf<Activation::softplus, Form::long_formula> {
  static constexpr const char* name = "softplus";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return select(z > F(20), z, select(z > F(0), z, F(0)) + log1p(exp_of_minus_magnitude(z)));
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    return select(z > F(20), grad_out, grad_out * sigmoid(z));
  }
};

struct Sigmoid : ActivationOf<Activation::sigmoid, Form::long_formula> {
  static constexpr const char* name = "sigmoid";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    return sigmoid(z);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    const F p = exp_of_minus_magnitude(z), q = F(1) + p;
    return grad_out * (p / (q * q));
  }
};

struct Tanh : ActivationOf<Activation::tanh, Form::long_formula> {
  static constexpr const char* name = "tanh";
  template <class F>
  static FASTBN_INLINE F forward(F z, F) {
    const F magnitude = select(z > F(0), z, -z), m = expm1(F(-2) * magnitude), t = m / (m + F(2));
    return select(z > F(0), -t, t);
  }
  template <class F>
  static FASTBN_INLINE F backward(F z, F grad_out, F) {
    const F p = exp_of_minus_magnitude(z + z), q = F(1) + p;
    return grad_out * (F(4) * (p / (q * q)));
  }
};

// All activations, in the order of the enum. Everything that depends on the activation is made from this list, so an
// activation that is in the list is supported everywhere, and one that is not has no number (fastbn.ops.activations
// compares the names at import).
template <class... All>
struct ActivationList {
  static constexpr int size = sizeof...(All);
};
using Activations = ActivationList<None, Relu, LeakyRelu, Relu6, Elu, Silu, Gelu, Hardswish, Hardsigmoid, Mish,
                                   Softplus, Sigmoid, Tanh>;

template <class... All>
constexpr bool is_in_order(ActivationList<All...>) {
  int index = 0;
  return ((int(All::id) == index++) && ...);
}
static_assert(is_in_order(Activations()), "Activations must have the order of the enum");
constexpr int activation_count = Activations::size;

// Calls `use(struct of the activation)`.
template <class Use, class... All>
FASTBN_INLINE constexpr void with_activation(Activation activation, Use&& use, ActivationList<All...>) {
  (void)((activation == All::id ? (use(All()), true) : false) || ...);
}
template <class Use>
FASTBN_INLINE constexpr void with_activation(Activation activation, Use&& use) {
  with_activation(activation, use, Activations());
}

FASTBN_INLINE constexpr Form form_of(Activation activation) {
  Form form = Form::identity;
  with_activation(activation, [&](auto a) FASTBN_INLINE_LAMBDA { form = a.form; });
  return form;
}

FASTBN_INLINE constexpr bool is_piecewise_linear(Activation activation) {
  return form_of(activation) == Form::piecewise_linear;
}

// Returns whether the derivative of a piecewise linear activation outside its upper branch is the parameter, not 0.
FASTBN_INLINE constexpr bool leaks(Activation activation) {
  bool result = false;
  with_activation(activation, [&](auto a) FASTBN_INLINE_LAMBDA {
    if constexpr (a.form == Form::piecewise_linear) result = a.leaks;
  });
  return result;
}

// Returns torch's default of the activation's parameter, 0 for one that has none.
FASTBN_INLINE constexpr double default_param_of(Activation activation) {
  double result = 0;
  with_activation(activation, [&](auto a) FASTBN_INLINE_LAMBDA {
    if constexpr (a.has_param) result = a.default_param;
  });
  return result;
}

// Returns whether a piecewise linear activation takes its upper branch at z, per lane.
template <class F>
FASTBN_INLINE auto activation_is_upper(Activation activation, F z) -> decltype(z > F(0)) {
  auto upper = z > F(0);
  with_activation(activation, [&](auto a) FASTBN_INLINE_LAMBDA {
    if constexpr (a.form == Form::piecewise_linear) upper = a.is_upper(z);
  });
  return upper;
}

// Returns grad_z of a piecewise linear activation from its mask. `param`, here and below, has F's element type.
template <class F, class Mask, class P>
FASTBN_INLINE F activation_backward_masked(Activation activation, Mask upper, F grad_out, P param) {
  return select(upper, grad_out, leaks(activation) ? grad_out * F(param) : F(0));
}

// Return activation(z), and grad_out * activation'(z).
template <class A, class F, class P>
FASTBN_INLINE F activation_forward(A, F z, P param) {
  return A::forward(z, F(param));
}
template <class A, class F, class P>
FASTBN_INLINE F activation_backward(A a, F z, F grad_out, P param) {
  if constexpr (A::form == Form::piecewise_linear)
    return activation_backward_masked(a.id, A::is_upper(z), grad_out, param);
  else
    return A::backward(z, grad_out, F(param));
}

// Do the same for an activation that is known only at run time.
template <class F, class P>
FASTBN_INLINE F activation_forward(Activation activation, F z, P param) {
  F y = z;
  with_activation(activation, [&](auto a) FASTBN_INLINE_LAMBDA { y = activation_forward(a, z, param); });
  return y;
}
template <class F, class P>
FASTBN_INLINE F activation_backward(Activation activation, F z, F grad_out, P param) {
  F grad_z = grad_out;
  with_activation(activation,
                  [&](auto a) FASTBN_INLINE_LAMBDA { grad_z = activation_backward(a, z, grad_out, param); });
  return grad_z;
}

}  // namespace fastbn
