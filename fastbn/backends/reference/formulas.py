"""Moments, normalisation and the input gradient as differentiable torch operations, in the dtype of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbn.backends.reference.activations import activation_backward, masked_backward
from fastbn.ops.activations import is_piecewise_linear


def wide(x: Tensor, per_channel: Tensor) -> Tensor:
    """Return a [C] vector in the dtype of x, in a shape that broadcasts against it."""
    return per_channel.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def reduced_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all dimensions except the second: two [C], zeros for an empty input."""
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[1])
        return zero, zero.clone()
    dims = reduced_dims(x)
    # The mean is taken about a first mean: rounding of the first does not matter, and a constant channel's is exact.
    pivot = x.detach().mean(dims)
    correction = (x - wide(x, pivot)).mean(dims)
    mean = pivot + torch.where(pivot.isinf(), 0.0, correction)  # an infinite mean stays infinite, as torch's does
    deviation = x - wide(x, mean)
    return mean, (deviation - wide(x, deviation.mean(dims))).square().mean(dims)


def unbiased(var: Tensor, count: int) -> Tensor:
    """Return var * n / (n - 1); NaN for one element, as in torch."""
    return var * (count / (count - 1)) if count > 1 else var * math.nan


def affine(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inv_std: Tensor
) -> Tensor:
    """Return z = (x - mean) * (weight * inv_std) + bias + residual."""
    z = (x - wide(x, mean)) * wide(x, inv_std if weight is None else inv_std * weight.to(inv_std.dtype))
    z = z if bias is None else z + wide(x, bias)
    return z if residual is None else z + residual.to(x.dtype)


def grad_z_of(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    upper: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    index: int,
    param: float | None = None,
) -> Tensor:
    if upper is not None and is_piecewise_linear(index):
        return masked_backward(grad_out, upper, index, param)
    if index == 0:
        return grad_out
    return activation_backward(grad_out, affine(x, residual, weight, bias, mean, inv_std), index, param)


def input_gradient(
    grad_z: Tensor,
    xhat: Tensor,
    weight: Tensor | None,
    inv_std: Tensor,
    sums: tuple[Tensor, Tensor, float | Tensor] | None,
) -> Tensor:
    if sums is not None:
        sum_grad, sum_grad_xhat, count = sums
        grad_z = grad_z - wide(xhat, sum_grad / count) - xhat * wide(xhat, sum_grad_xhat / count)
    return grad_z * wide(xhat, inv_std if weight is None else inv_std * weight.to(inv_std.dtype))


def param_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
