"""Batch normalisation whose backward reads the output: what save="output" keeps in place of the input, or of a mask.

The next layer often keeps the output anyway (a convolution its input), and nothing else keeps the input of a
normalisation. So where z = weight * xhat + bias can be recovered from the output, the input need not be kept, and where
the output tells the branch of a piecewise linear activation, the mask.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.autograd import batch_norm as fused
from fastbn.backends.reference.activations import is_upper, masked_backward
from fastbn.ops import dispatch, errors
from fastbn.ops.activations import ROWS
from fastbn.ops.dispatch import Backend, Call

# Smaller weights are taken for 0, where no output tells xhat: the smallest normal number of float16, in which z then
# has all of its digits.
MIN_WEIGHT = 2.0**-14
# The largest |bias| / |weight| for which z, in the dtype of the output, has enough digits of xhat: the error is that of
# an input, in the same dtype, whose mean is as many standard deviations from 0.
MAX_SHIFT = 4.0


class Kept(enum.Enum):
    """What is kept for backward beside vectors of C elements."""

    INPUT = "what save='input' keeps"
    OUTPUT = "the output in place of the input"
    BOTH = "the output in place of the mask, and the input"


def kept(activation: int, param: float | None, has_residual: bool) -> Kept:
    """Return what save="output" keeps of a call with this epilogue."""
    name = ROWS[activation].name
    invertible = slope_of(activation, param) is not None
    if not has_residual:
        return Kept.OUTPUT if invertible else Kept.INPUT
    # Rounding to the output's dtype moves no z across 0, but some across the 6 of relu6.
    return Kept.BOTH if name == "relu" or name == "leaky_relu" and invertible else Kept.INPUT


def slope_of(activation: int, param: float | None) -> float | None:
    """Return the smallest derivative of an activation that save="output" inverts; None for the others.

    Those are leaky_relu with a slope above 0, and none. Others lose digits where they are flat, as elu does below -5.
    """
    row = ROWS[activation]
    if row.name == "none":
        return 1.0
    slope = row.param(param)[0] if row.name == "leaky_relu" else 0.0  # type: ignore[misc]
    return min(slope, 1.0) if slope > 0 else None


def are_recoverable(weight: Tensor | None, bias: Tensor | None, slope: float) -> Tensor:
    """Return whether each channel's xhat can be recovered from the output: bool of no dimensions, on their device."""
    either = weight if weight is not None else bias
    if either is None:
        return torch.ones((), dtype=torch.bool)
    size = torch.ones_like(either) if weight is None else weight.detach().abs()
    fits = size * slope >= MIN_WEIGHT
    return (fits if bias is None else fits & (bias.detach().abs() <= MAX_SHIFT * size)).all()


def batch_norm(call: Call, backend: Backend) -> Tensor:
    """Return what `fastbn.autograd.batch_norm.batch_norm` returns, keeping the output where that spares memory.

    Compilers decide for themselves what they keep.
    """
    keeps = kept(call.activation, call.activation_param, call.residual is not None)
    if keeps is Kept.INPUT or torch.compiler.is_compiling() or not dispatch.is_recorded(call):
        return fused.batch_norm(call, backend)
    if dispatch.cannot_be_saved(*call[:6]):
        return fused.batch_norm(call, backend)  # which refuses
    apply: Any = BatchNormFromOutput.apply  # typed in some releases of torch
    try:
        return apply(call.input, call.residual, call.weight, call.bias, (call, backend, keeps))
    except RuntimeError as error:
        errors.raise_of_torch(error)
        raise


class BatchNormFromOutput(torch.autograd.Function):
    """The fused op, differentiable once in the first four operands of the call; `chosen` keeps OUTPUT or BOTH."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        chosen: tuple[Call, Backend, Kept],
    ) -> Tensor:
        call, backend, keeps = chosen
        operands = input, residual, weight, bias, call.running_mean, call.running_var
        options = call.eps, call.activation, False, call.activation_param
        with fused.below_autograd():
            if call.training:
                results = backend.ops.batch_norm_train(*operands, call.num_batches_tracked, call.momentum, *options)
            else:
                results = backend.ops.batch_norm_frozen(*operands, *options)
        output, mean, inv_std, _ = results
        both = keeps is Kept.BOTH
        needs_input_data = both and (call.training or ctx.needs_input_grad[2])
        vectors = [t for t in (mean, inv_std, weight, bias) if t is not None]
        ctx.save_for_backward(output, *vectors, *([input] if needs_input_data else []))
        ctx.options = call.training, call.activation, call.activation_param, backend, both
        ctx.has_vectors = weight is not None, bias is not None
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("batch_norm: expected save='input' where backward is differentiated, got save='output'")
        batch_stats, activation, param, backend, both = ctx.options
        has_weight, has_bias = ctx.has_vectors
        output, mean, inv_std, *others = ctx.saved_tensors
        weight = others.pop(0) if has_weight else None
        bias = others.pop(0) if has_bias else None
        need_input, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_z = grad_out
        if activation:  # z and output are on the same branch
            grad_z = masked_backward(grad_out, is_upper(output, activation), activation, param)
        if both:
            # Of an input that is not needed only shape, dtype and format matter.
            operands = others.pop() if others else output, None, None, weight, bias, mean, inv_std
        else:
            operands = _call_of_z(output, weight, bias, inv_std, activation, param)
        try:
            with fused.below_autograd():
                grads = backend.ops.batch_norm_backward(
                    grad_z, *operands, batch_stats, 0, need_input, need_weight, need_bias, False, None
                )
        except RuntimeError as error:
            errors.raise_of_torch(error)
            raise
        grad_input, grad_weight, grad_bias, _ = grads
        return (
            grad_input if need_input else None,
            grad_z if need_residual else None,
            grad_weight.to(weight.dtype) if need_weight else None,  # type: ignore[union-attr]
            grad_bias.to(bias.dtype) if need_bias else None,  # type: ignore[union-attr]
            None,
        )


def _call_of_z(
    output: Tensor, weight: Tensor | None, bias: Tensor | None, inv_std: Tensor, activation: int, param: float | None
) -> tuple[Tensor, None, None, Tensor, None, Tensor, Tensor]:
    """Return input, residual, mask, weight, bias, mean and inv_std of a backward with the same xhat and gradients.

    Its input is z, its mean `bias` and its inv_std 1 / weight, so that xhat = (z - bias) / weight; its weight makes
    weight * inv_std what it was. Where weight is about 0, z - bias is taken for xhat: the gradient of weight is lost,
    that of the input is right.
    """
    z = output
    if activation:
        (slope,) = ROWS[activation].param(param)  # type: ignore[misc]
        z = F.leaky_relu(output, 1 / slope)
    scale = torch.ones_like(inv_std) if weight is None else weight.to(inv_std.dtype)
    mean = torch.zeros_like(inv_std) if bias is None else bias.to(inv_std.dtype)
    inv_std_of_z = torch.where(scale.abs() < MIN_WEIGHT, 1.0, scale.reciprocal())
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z, None, None, (scale * inv_std / inv_std_of_z).to(dtype), None, mean, inv_std_of_z
