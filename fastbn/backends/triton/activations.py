"""The activations and their derivatives, with the formulas and branches of csrc/math/activation.h.

Comparisons are written so that a NaN takes the branch that is meant for it. Nothing is called but exp and erf, which
Triton has for every GPU: its division and exp are within 2 ulp there, and what would cancel is a series instead.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """Return exp(x) - 1: near 0, where the difference would cancel, by the series of x^n / n!."""
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    near = tl.where((x > -0.5) & (x < 0.5), x, 0.0)
    series = near * 0.0 + 1.0
    for n in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * near / n
    return tl.where((x > -0.5) & (x < 0.5), near * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """Return log(1 + x) for x in [0, 1]: 2 artanh(s), s = x / (2 + x), by the series of s^(2n + 1) / (2n + 1)."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    s = x / (2.0 + x)
    square = s * s
    series = square * 0.0
    for n in tl.static_range(TERMS - 1, 0, -1):
        series = (series + 1.0 / (2 * n + 1)) * square
    return 2.0 * s * (1.0 + series)


@triton.jit
def exp_of_minus_magnitude(z):
    """Return exp(-|z|), which does not overflow."""
    return tl.exp(tl.where(z > 0, -z, z))


@triton.jit
def sigmoid(z):
    p = exp_of_minus_magnitude(z)
    return tl.where(z > 0, 1.0, p) / (1.0 + p)


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.70710678118654752440))


@triton.jit
def tanh_of_softplus(z, p):
    """Return tanh(softplus(z)) as (numerator, denominator), from p = exp(-|z|): neither overflows nor cancels."""
    negative = p * (p + 2.0)
    numerator = tl.where(z > 0, 1.0 + (p + p), negative)
    return numerator, tl.where(z > 0, numerator + (p + p) * p, negative + 2.0)


@triton.jit
def ramp_of(z):
    """Return relu6(z + 3)."""
    ramp = z + 3.0
    return tl.where(ramp <= 0, 0.0, tl.where(ramp >= 6, 6.0, ramp))


@triton.jit
def activate(z, param, ACTIVATION: tl.constexpr):
    """Return activation(z). `param`: the slope of leaky_relu or the alpha of elu."""
    if ACTIVATION == "none":
        y = z
    elif ACTIVATION == "relu":
        y = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0, z, z * param)
    elif ACTIVATION == "relu6":
        y = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "elu":
        y = tl.where(z <= 0, expm1(z) * param, z)
    elif ACTIVATION == "silu":
        y = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        y = z * normal_cdf(z)
    elif ACTIVATION == "hardswish":
        y = z * ramp_of(z) / 6.0
    elif ACTIVATION == "hardsigmoid":
        y = ramp_of(z) / 6.0
    elif ACTIVATION == "mish":
        numerator, denominator = tanh_of_softplus(z, exp_of_minus_magnitude(z))
        y = z * (numerator / denominator)
    elif ACTIVATION == "softplus":
        y = tl.where(z > 20, z, tl.where(z > 0, z, 0.0) + log1p(exp_of_minus_magnitude(z)))
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        m = expm1(-2.0 * tl.where(z > 0, z, -z))
        t = m / (m + 2.0)
        y = tl.where(z > 0, -t, t)
    return y


@triton.jit
def is_upper(z, ACTIVATION: tl.constexpr):
    """Return where a piecewise linear activation takes its upper branch: the bits of the mask."""
    if ACTIVATION == "relu":
        upper = (z <= 0) == 0
    elif ACTIVATION == "leaky_relu":
        upper = z > 0
    else:
        tl.static_assert(ACTIVATION == "relu6")
        upper = (z > 0) & (z < 6)
    return upper


@triton.jit
def masked_backward(upper, grad_out, param, ACTIVATION: tl.constexpr):
    """Return grad_out * activation'(z) of a piecewise linear activation, from where its derivative is 1."""
    if ACTIVATION == "leaky_relu":
        grad_z = tl.where(upper, grad_out, grad_out * param)
    else:
        grad_z = tl.where(upper, grad_out, 0.0)
    return grad_z


@triton.jit
def activate_backward(z, grad_out, param, ACTIVATION: tl.constexpr):
    """Return grad_out * activation'(z)."""
    if ACTIVATION == "none":
        grad_z = grad_out
    elif ACTIVATION == "relu" or ACTIVATION == "leaky_relu" or ACTIVATION == "relu6":
        grad_z = masked_backward(is_upper(z, ACTIVATION), grad_out, param, ACTIVATION)
    elif ACTIVATION == "elu":
        grad_z = tl.where(z > 0, grad_out, grad_out * (tl.exp(z) * param))
    elif ACTIVATION == "silu":
        e = tl.exp(-z)  # where z > 0, e * s is 1 - s without the cancellation
        s = 1.0 / (1.0 + e)
        grad_z = grad_out * (s * (1.0 + z * tl.where(z > 0, e * s, 1.0 - s)))
    elif ACTIVATION == "gelu":
        density = tl.exp(z * z * -0.5) * 0.39894228040143267794
        grad_z = grad_out * (normal_cdf(z) + z * density)
    elif ACTIVATION == "hardswish":
        grad_z = tl.where(z <= -3, 0.0, tl.where(z >= 3, grad_out, grad_out * (z * (1.0 / 3.0) + 0.5)))
    elif ACTIVATION == "hardsigmoid":
        grad_z = tl.where((z > -3) & (z < 3), grad_out * (1.0 / 6.0), 0.0)
    elif ACTIVATION == "mish":
        p = exp_of_minus_magnitude(z)
        numerator, denominator = tanh_of_softplus(z, p)
        inverse = 1.0 / denominator
        slope = 4.0 * (tl.where(z > 0, p * p, p) * (1.0 + p)) * (inverse * inverse)  # of the tanh
        grad_z = grad_out * (numerator * inverse + z * slope)
    elif ACTIVATION == "softplus":
        grad_z = tl.where(z > 20, grad_out, grad_out * sigmoid(z))
    elif ACTIVATION == "sigmoid":
        p = exp_of_minus_magnitude(z)
        grad_z = grad_out * (p / ((1.0 + p) * (1.0 + p)))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        p = exp_of_minus_magnitude(z + z)
        grad_z = grad_out * (4.0 * (p / ((1.0 + p) * (1.0 + p))))
    return grad_z
