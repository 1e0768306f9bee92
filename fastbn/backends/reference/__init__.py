"""Every op of the contract (docs/design.md) in plain torch operations, computed in float64 and differentiable.

Arguments, results and dtypes are the contract's. Whoever wants results unrounded passes float64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.backends.reference.activations import (
    activation,
    activation_backward,
    activation_grad,
    is_upper,
    masked_backward,
)
from fastbn.backends.reference.formulas import (
    affine,
    grad_z_of,
    input_gradient,
    moments,
    param_dtype,
    reduced_dims,
    unbiased,
    wide,
)
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.layout import pack_mask, suggest_memory_format, unpack_mask

__all__ = [
    "activation",
    "activation_backward",
    "activation_grad",
    "batch_norm_backward",
    "batch_norm_eval",
    "batch_norm_frozen",
    "batch_norm_train",
    "channel_stats",
    "grad_sums",
    "input_grad",
    "is_upper",
    "masked_backward",
    "moments",
    "normalize",
    "pack_mask",
    "suggest_memory_format",
    "unbiased",
    "unpack_mask",
]

EMPTY = (0,)


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def _like(result: Tensor, x: Tensor) -> Tensor:
    return result.to(x.dtype).contiguous(memory_format=suggest_memory_format(x))


def _output(x: Tensor, z: Tensor, index: int, param: float | None, save_mask: bool) -> tuple[Tensor, Tensor]:
    mask = torch.empty(EMPTY, dtype=torch.uint8, device=x.device)
    if save_mask and is_piecewise_linear(index):
        mask = pack_mask(is_upper(z, index), suggest_memory_format(x))
    return _like(activation(z, index, param), x), mask


@torch.no_grad()
def _update_buffers(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    if x.numel() == 0:
        return
    count = x.numel() // x.shape[1]
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    else:
        factor = 0.0 if num_batches_tracked is None else 1.0 / num_batches_tracked.double()
    for buffer, batch in ((running_mean, mean), (running_var, unbiased(var, count))):
        if buffer is not None:
            buffer.copy_((1 - factor) * buffer.double() + factor * batch)


def batch_norm_train(
    input,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    momentum,
    eps,
    activation,
    save_mask,
    activation_param=None,
):
    """Normalise with the statistics of the batch and update the buffers: (output, mean, inv_std, mask)."""
    x, r, w, b = _double(input, residual, weight, bias)
    mean, var = moments(x)
    _update_buffers(x, mean, var, running_mean, running_var, num_batches_tracked, momentum)
    inv_std = (var + eps).rsqrt()
    # x is taken about the exact mean: its rounding error shows where it is far larger than the standard deviation.
    x = x - wide(x, mean)
    z = affine(x, r, w, b, x.mean(reduced_dims(x)), inv_std)
    output, mask = _output(input, z, activation, activation_param, save_mask)
    return output, mean, inv_std, mask


def batch_norm_eval(input, residual, weight, bias, running_mean, running_var, eps, activation, activation_param=None):
    """Normalise with the running statistics: output."""
    options = eps, activation, False, activation_param
    return batch_norm_frozen(input, residual, weight, bias, running_mean, running_var, *options)[0]


def batch_norm_frozen(
    input, residual, weight, bias, running_mean, running_var, eps, activation, save_mask, activation_param=None
):
    """Normalise with the running statistics, for backward: (output, mean, inv_std, mask)."""
    x, r, w, b, mean, var = _double(input, residual, weight, bias, running_mean, running_var)
    inv_std = (var + eps).rsqrt()
    output, mask = _output(input, affine(x, r, w, b, mean, inv_std), activation, activation_param, save_mask)
    return output, mean.clone(), inv_std, mask


def channel_stats(input):
    """Return (mean, biased var), float64 [C]; zeros for an empty input, which merges as a rank with count 0."""
    return moments(input.double())


def normalize(input, residual, weight, bias, mean, inv_std, activation, save_mask, activation_param=None):
    """Normalise with given statistics: (output, mask)."""
    x, r, w, b = _double(input, residual, weight, bias)
    return _output(input, affine(x, r, w, b, mean, inv_std), activation, activation_param, save_mask)


def _gradients(grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param):
    """Return grad_z, xhat and the sums per channel of grad_z and of grad_z * xhat, all float64."""
    upper = None if mask is None else unpack_mask(mask, input.shape)
    g, x, r, w, b = _double(grad_out, input, residual, weight, bias)
    grad_z = grad_z_of(g, x, r, upper, w, b, mean, inv_std, activation, activation_param)
    xhat = (x - wide(x, mean)) * wide(x, inv_std)
    dims = reduced_dims(x)
    return grad_z, xhat, grad_z.sum(dims), (grad_z * xhat).sum(dims)


def batch_norm_backward(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    batch_stats,
    activation,
    need_input,
    need_weight,
    need_bias,
    need_residual,
    activation_param=None,
):
    """Return (grad_input, grad_weight, grad_bias, grad_residual); shape [0] for what is not needed."""
    grad_z, xhat, sum_grad, sum_grad_xhat = _gradients(
        grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param
    )
    dtype = param_dtype(input, weight, bias)
    grad_input, grad_residual = input.new_empty(EMPTY), input.new_empty(EMPTY)
    if need_input:
        sums = (sum_grad, sum_grad_xhat, max(input.numel() // input.shape[1], 1)) if batch_stats else None
        grad_input = _like(input_gradient(grad_z, xhat, weight, inv_std, sums), input)
    if need_residual:
        grad_residual = _like(grad_z, input).clone()
    grad_weight = sum_grad_xhat.to(dtype) if need_weight else input.new_empty(EMPTY, dtype=dtype)
    grad_bias = sum_grad.to(dtype) if need_bias else input.new_empty(EMPTY, dtype=dtype)
    return grad_input, grad_weight, grad_bias, grad_residual


def grad_sums(grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param=None):
    """Return (sum_grad, sum_grad_xhat) per channel, float64 [C]."""
    return _gradients(grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param)[2:]


def input_grad(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    sum_grad,
    sum_grad_xhat,
    count,
    activation,
    need_residual,
    activation_param=None,
):
    """Return (grad_input, grad_residual) from the sums of all ranks and their count; three None: frozen statistics."""
    grad_z, xhat, _, _ = _gradients(
        grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param
    )
    sums = None if sum_grad is None else (sum_grad, sum_grad_xhat, count)
    grad_input = _like(input_gradient(grad_z, xhat, weight, inv_std, sums), input)
    return grad_input, _like(grad_z, input).clone() if need_residual else input.new_empty(EMPTY)
