"""What fastbn.reference is made of: activations, the mask, moments and the gradient as differentiable torch operations.

They compute in the dtype of their arguments. `backward_formula` is also the double backward of the autograd Function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn._activations import ACTIVATIONS, is_piecewise_linear

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
        # exp of the unused branch would overflow, and its inf would make the second derivative NaN.
        return torch.where(z > 0, grad_out, grad_out * torch.where(z > 0, 0.0, z).exp())
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


def suggest_memory_format(x: Tensor) -> torch.memory_format:
    """The format of output and gradients.

    A tensor that is dense in exactly one format has that format. For all others the answer is that of ATen's
    Tensor.suggest_memory_format, which depends on the strides of dimensions of size 1 too.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats:
        return torch.contiguous_format
    if _has_strides_of_channels_last(x):
        return formats[x.dim()]
    last = x.is_contiguous(memory_format=formats[x.dim()]) and not x.is_contiguous()
    return formats[x.dim()] if last else torch.contiguous_format


def _has_strides_of_channels_last(x: Tensor) -> bool:
    """Check the strides up to gaps. Those of a contiguous tensor do not count, where sizes of 1 make them fit too."""
    if x.stride(1) == 0:
        return False
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * x.size(d)
    return True


def runs_of(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[bool, int, int]:
    """(whether a run goes over the channels, runs, elements a run) of a tensor of that shape and format."""
    outer, channels, inner = shape[0], shape[1], math.prod(shape[2:])
    if channels == 1:  # one long run, whatever the format
        return False, 1, outer * inner
    if memory_format != torch.contiguous_format or inner == 1:
        return True, outer * inner, channels
    return False, outer * channels, inner


def mask_shape(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    """[rows, ceil(C / 8)] where a run goes over the channels, else [N, C, ceil(run / 8)]: it tells the layout."""
    over_channels, runs, run = runs_of(shape, memory_format)
    width = (run + 7) // 8
    if over_channels:
        return runs, width
    return (1, 1, width) if shape[1] == 1 else (shape[0], shape[1], width)


def pack_mask(upper: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Bits of a bool tensor (N, C, *): uint8 of `mask_shape`, element i of a run in bit i % 8 of byte i / 8."""
    shape = tuple(upper.shape)
    over_channels, runs, run = runs_of(shape, memory_format)
    bits = (upper.movedim(1, -1) if over_channels else upper).reshape(runs, run)
    width = (run + 7) // 8
    bits = F.pad(bits.to(torch.uint8), (0, width * 8 - run)).view(runs, width, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=upper.device)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(mask_shape(shape, memory_format))


def unpack_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_mask`: bool of the shape given, whatever memory format it was packed in."""
    shape = tuple(shape)
    over_channels = mask.dim() == 2
    run = shape[1] if over_channels else math.prod(shape) // math.prod(mask.shape[:2]) if mask.numel() else 0
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :run].bool()
    if over_channels:
        return bits.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return bits.reshape(shape)


def wide(x: Tensor, per_channel: Tensor) -> Tensor:
    """A [C] vector in the dtype of x, to broadcast against it."""
    return per_channel.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def reduced_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the second: two [C]. Zeros for an empty input."""
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[1])
        return zero, zero.clone()
    dims = reduced_dims(x)
    # The mean about a first mean: rounding of the first does not matter, and a constant channel's is exact.
    pivot = x.detach().mean(dims)
    correction = (x - wide(x, pivot)).mean(dims)
    mean = pivot + torch.where(pivot.isinf(), 0.0, correction)  # an infinite mean stays infinite, as torch's does
    deviation = x - wide(x, mean)
    return mean, (deviation - wide(x, deviation.mean(dims))).square().mean(dims)


def _power_of_two_below(size: Tensor) -> Tensor:
    """2^-n for a `size` in [2^(n-1), 2^n), so that their product is below 1; 1 for 0, inf and NaN. float64 [C]."""
    size = torch.where(size.isfinite(), size, 0.0)
    return torch.ldexp(torch.ones_like(size), -torch.frexp(size).exponent)


def to_unit_scale(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, unit, eps of y): y is `x` less about its mean, times the power of two `unit` ([C], as eps is).

    Variances of x leave the range of float32 long before the gradients do, those of y do not: its largest magnitude, or
    the square root of its eps, is about 1. Derivatives take the shift and the unit for constants.
    """
    dims = reduced_dims(x)
    with torch.no_grad():
        # Not by one power of two: a mean far off would leave no digits of a small x, or x overflow.
        largest = x.abs().amax(dims).double()
        first = _power_of_two_below(largest.clamp(min=math.sqrt(eps))).clamp(2.0**-126, 2.0**126)
        near = x * wide(x, first)
        pivot = near.mean(dims)
        pivot = torch.where(pivot.isfinite(), pivot, 0.0)
        spread = (near - wide(x, pivot)).abs().amax(dims).double()
        second = _power_of_two_below(torch.maximum(spread, first * math.sqrt(eps)))
        unit = first * second
    y = (x * wide(x, first) - wide(x, pivot)) * wide(x, second)
    return y, unit, eps * unit.square()


def unbiased(var: Tensor, count: int) -> Tensor:
    """var * n / (n - 1); NaN for one element, as in torch."""
    return var * (count / (count - 1)) if count > 1 else var * math.nan


def affine(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inv_std: Tensor
) -> Tensor:
    """z = (x - mean) * (weight * inv_std) + bias + residual."""
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
) -> Tensor:
    if upper is not None and is_piecewise_linear(index):
        return masked_backward(grad_out, upper, index)
    if index == 0:
        return grad_out
    return activation_backward(grad_out, affine(x, residual, weight, bias, mean, inv_std), index)


def input_gradient(
    grad_z: Tensor, xhat: Tensor, weight: Tensor | None, inv_std: Tensor, sums: tuple[Tensor, Tensor, object] | None
) -> Tensor:
    if sums is not None:
        sum_grad, sum_grad_xhat, count = sums
        grad_z = grad_z - wide(xhat, sum_grad / count) - xhat * wide(xhat, sum_grad_xhat / count)
    return grad_z * wide(xhat, inv_std if weight is None else inv_std * weight.to(inv_std.dtype))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias, grad_residual) as a differentiable composition in `dtype`.

    With `mean` and `inv_std` ([C]) statistics are frozen. Without them they are those of x, made from it and `eps`
    here, so that derivatives of the result know how they depend on x. `mask` is a constant. The gradients of input and
    residual have the dtype of x, those of weight and bias the dtype of weight (else bias, else x).
    """
    upper = None if mask is None else unpack_mask(mask, x.shape)
    g, x_, r = grad_out.to(dtype), x.to(dtype), None if residual is None else residual.to(dtype)
    w, b = (None if t is None else t.to(dtype) for t in (weight, bias))
    batch_stats = mean is None
    unit = None
    if batch_stats:
        if x.numel():
            x_, unit, eps = to_unit_scale(x_, eps)
            eps = eps.to(dtype)
        m, var = moments(x_)
        s = (var + eps).rsqrt()
    else:
        m, s = mean.to(dtype), inv_std.to(dtype)
    grad_z = grad_z_of(g, x_, r, upper, w, b, m, s, activation)
    xhat = (x_ - wide(x_, m)) * wide(x_, s)
    dims = reduced_dims(x)
    sum_grad, sum_grad_xhat = grad_z.sum(dims), (grad_z * xhat).sum(dims)
    sums = (sum_grad, sum_grad_xhat, x.numel() // x.shape[1]) if batch_stats and x.numel() else None
    grad_x = input_gradient(grad_z, xhat, w, s, sums)
    grad_x = grad_x if unit is None else grad_x * wide(x_, unit)
    per_channel = param_dtype(x, weight, bias)
    return grad_x.to(x.dtype), sum_grad_xhat.to(per_channel), sum_grad.to(per_channel), grad_z.to(x.dtype)


def param_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
