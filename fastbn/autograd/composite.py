"""The gradient as a differentiable composition of torch operations: the double backward of the autograd Function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbn.backends.reference.formulas import grad_z_of, input_gradient, moments, param_dtype, reduced_dims, wide
from fastbn.ops.layout import unpack_mask


def _power_of_two_below(size: Tensor) -> Tensor:
    """Return 2^-n for sizes in [2^(n-1), 2^n), float64 [C], so that the product is below 1; 1 for 0, inf and NaN."""
    size = torch.where(size.isfinite(), size, 0.0)
    return torch.ldexp(torch.ones_like(size), -torch.frexp(size).exponent)


def to_unit_scale(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, unit, eps of y): y is `x` minus about its mean, times the power of two `unit` ([C], as eps is).

    Variances of x leave the range of float32 long before the gradients do. Those of y do not: its largest magnitude, or
    the square root of its eps, is about 1. Derivatives take the shift and the unit for constants.
    """
    dims = reduced_dims(x)
    with torch.no_grad():
        # One power of two is not enough: with a mean far off, a small x would lose all digits, or x would overflow.
        max_magnitude = x.abs().amax(dims).double()
        first = _power_of_two_below(max_magnitude.clamp(min=math.sqrt(eps))).clamp(2.0**-126, 2.0**126)
        near = x * wide(x, first)
        pivot = near.mean(dims)
        pivot = torch.where(pivot.isfinite(), pivot, 0.0)
        spread = (near - wide(x, pivot)).abs().amax(dims).double()
        second = _power_of_two_below(torch.maximum(spread, first * math.sqrt(eps)))
        unit = first * second
    y = (x * wide(x, first) - wide(x, pivot)) * wide(x, second)
    return y, unit, eps * unit.square()


def backward_formula(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    eps: float | None = None,
    dtype: torch.dtype = torch.float64,
    activation_param: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (grad_input, grad_weight, grad_bias, grad_residual) as a differentiable composition in `dtype`.

    With `mean` and `inv_std` ([C]) statistics are frozen. Without them they are those of x, made from it and `eps`
    here, so that derivatives of the result know how they depend on x. `mask` is a constant. The gradients of input and
    residual have the dtype of x, those of weight and bias the dtype of weight (else bias, else x).
    """
    upper = None if mask is None else unpack_mask(mask, x.shape)
    g, x_, r = grad_out.to(dtype), x.to(dtype), None if residual is None else residual.to(dtype)
    w, b = (None if t is None else t.to(dtype) for t in (weight, bias))
    batch_stats = mean is None
    unit = None
    if mean is not None and inv_std is not None:
        m, s = mean.to(dtype), inv_std.to(dtype)
    else:
        assert eps is not None
        unit_eps: float | Tensor = eps
        if x.numel():
            x_, unit, scaled_eps = to_unit_scale(x_, eps)
            unit_eps = scaled_eps.to(dtype)
        m, var = moments(x_)
        s = (var + unit_eps).rsqrt()
    grad_z = grad_z_of(g, x_, r, upper, w, b, m, s, activation, activation_param)
    xhat = (x_ - wide(x_, m)) * wide(x_, s)
    dims = reduced_dims(x)
    sum_grad, sum_grad_xhat = grad_z.sum(dims), (grad_z * xhat).sum(dims)
    sums = (sum_grad, sum_grad_xhat, x.numel() // x.shape[1]) if batch_stats and x.numel() else None
    grad_x = input_gradient(grad_z, xhat, w, s, sums)
    grad_x = grad_x if unit is None else grad_x * wide(x_, unit)
    per_channel = param_dtype(x, weight, bias)
    return grad_x.to(x.dtype), sum_grad_xhat.to(per_channel), sum_grad.to(per_channel), grad_z.to(x.dtype)
