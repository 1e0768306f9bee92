"""The inputs of a workload, the same tensors for all implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.testing.cases import Case, make_on_device, make_vector
from fastbn.testing.tolerance import forward_tolerance

EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: input, residual and grad_out in its dtype and layout, the others float32, [C]."""

    case: Case
    input: Tensor
    residual: Tensor
    grad_out: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Make normal values with another mean and scale in each channel, from fixed seeds."""

    def vector(seed: int, low: float, high: float) -> Tensor:
        return make_vector(case.channels, torch.float32, device, seed, low, high)

    wide = (1, -1, *[1] * (len(case.shape) - 2))
    x = make_on_device(case, dtype, device, 0)
    x.mul_(vector(1, 0.5, 1.5).to(dtype).view(wide)).add_(vector(2, -0.5, 0.5).to(dtype).view(wide))
    residual, grad_out = make_on_device(case, dtype, device, 3), make_on_device(case, dtype, device, 4)
    weight, bias = vector(5, 0.5, 1.5), vector(6, -0.5, 0.5)
    running_mean, running_var = vector(7, -0.5, 0.5), vector(8, 0.5, 1.5)
    _away_from_kinks(x, residual, grad_out, weight, bias, running_mean, running_var)
    return Inputs(case, x, residual, grad_out, weight, bias, running_mean, running_var)


def _away_from_kinks(
    x: Tensor,
    residual: Tensor,
    grad_out: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
) -> None:
    """Zero the gradient where rounding decides on which side of a kink at 0 an element lies.

    Either answer is right: an implementation that rounds the sum before the activation gives another than one that does
    not.
    """
    for training in (True, False):
        z = F.batch_norm(x.float(), running_mean.clone(), running_var.clone(), weight, bias, training, MOMENTUM, EPS)
        scale = z.abs().max().item() + residual.abs().max().item()
        margin = forward_tolerance(x.dtype, x.numel() // x.size(1), scale).item()
        grad_out.masked_fill_(z.abs() < margin, 0)
        grad_out.masked_fill_(z.add_(residual).abs() < margin, 0)
