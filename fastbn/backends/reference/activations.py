"""Activations and their derivatives by index, as differentiable torch operations in the dtype of their arguments.

The formulas are those of the rows in fastbn.ops.activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.ops.activations import ROWS


def activation(z: Tensor, index: int, param: float | None = None) -> Tensor:
    """Return activation(z), as torch computes it."""
    row = ROWS[index]
    return row.forward(z, *row.param(param))


def activation_backward(grad_out: Tensor, z: Tensor, index: int, param: float | None = None) -> Tensor:
    """Return grad_out * activation'(z), differentiable in both."""
    row = ROWS[index]
    if row.backward is None:
        return masked_backward(grad_out, is_upper(z, index), index, param)
    return row.backward(grad_out, z, *row.param(param))


def activation_grad(z: Tensor, index: int, param: float | None = None) -> Tensor:
    """Return activation'(z)."""
    return activation_backward(torch.ones_like(z), z, index, param)


def is_upper(z: Tensor, index: int) -> Tensor:
    """Return where a piecewise linear activation takes its upper branch, the bits of the mask: bool, the shape of z."""
    row = ROWS[index]
    if row.is_upper is None:
        raise ValueError(f"mask: expected a piecewise linear activation, got {row.name!r}")
    return row.is_upper(z)


def masked_backward(grad_out: Tensor, upper: Tensor, index: int, param: float | None = None) -> Tensor:
    """Return `activation_backward` of a piecewise linear activation from its bits."""
    slope = ROWS[index].param(param)
    return torch.where(upper, grad_out, grad_out * slope[0] if slope else torch.zeros_like(grad_out))
