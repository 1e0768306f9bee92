"""Activations and their derivatives as differentiable torch operations, in the dtype of their arguments."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.ops.activations import ACTIVATIONS, is_piecewise_linear

LEAKY_SLOPE = 0.01


def activation(z: Tensor, index: int) -> Tensor:
    """activation(z), as torch computes it."""
    name = ACTIVATIONS[index]
    return z if name == "none" else getattr(F, name)(z)


def activation_backward(grad_out: Tensor, z: Tensor, index: int) -> Tensor:
    """grad_out * activation'(z), differentiable in both.

    The branches at the boundaries are those of torch's `*_backward` kernels, and at NaN those of the vectorised ones
    for CPUs. Where the derivative is 0 the result is 0 whatever grad_out is.
    """
    name = ACTIVATIONS[index]
    if name == "none":
        return grad_out
    if is_piecewise_linear(index):
        return masked_backward(grad_out, is_upper(z, index), index)
    if name == "elu":
        # exp of the unused branch would overflow, and its inf would make the second derivative NaN. At 0, where both
        # give 1, the second derivative is 0, as torch's is.
        return torch.where(z >= 0, grad_out, grad_out * torch.where(z >= 0, 0.0, z).exp())
    if name == "silu":
        s = torch.sigmoid(z)
        return grad_out * (s * (1 + z * (1 - s)))
    if name == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return grad_out * (0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density)
    ramp = torch.where(z >= 3, grad_out, grad_out * (z / 3 + 0.5))  # hardswish
    return torch.where(z <= -3, torch.zeros_like(ramp), ramp)


def activation_grad(z: Tensor, index: int) -> Tensor:
    """activation'(z)."""
    return activation_backward(torch.ones_like(z), z, index)


def is_upper(z: Tensor, index: int) -> Tensor:
    """Where a piecewise linear activation takes its upper branch: the bits of the mask. bool, the shape of z."""
    name = ACTIVATIONS[index]
    if name == "relu":
        return ~(z <= 0)
    if name == "leaky_relu":
        return z > 0
    if name == "relu6":
        return (z > 0) & (z < 6)
    raise ValueError(f"mask: expected a piecewise linear activation, got {name!r}")


def masked_backward(grad_out: Tensor, upper: Tensor, index: int) -> Tensor:
    """`activation_backward` of a piecewise linear activation from its bits."""
    lower = grad_out * LEAKY_SLOPE if ACTIVATIONS[index] == "leaky_relu" else torch.zeros_like(grad_out)
    return torch.where(upper, grad_out, lower)
