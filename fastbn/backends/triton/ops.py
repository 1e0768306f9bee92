"""The eight ops: check, allocate, plan, launch. Arguments and results are the contract's (docs/design.md).

Everything is allocated before anything is launched, so that no buffer has moved when memory runs out.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from fastbn.backends.triton import plans
from fastbn.backends.triton.arguments import Operands
from fastbn.backends.triton.grad_sums import finish_grad_sums_kernel, grad_sums_kernel
from fastbn.backends.triton.input_grad import input_grad_kernel
from fastbn.backends.triton.moments import count_kernel, finish_moments_kernel, moments_kernel
from fastbn.backends.triton.normalize import normalize_kernel
from fastbn.backends.triton.plans import FINISH_CHANNELS, FINISH_SPLITS, Blocks, Layout
from fastbn.backends.triton.resident import resident_backward_kernel, resident_forward_kernel
from fastbn.backends.triton.tuning import limits_of
from fastbn.ops.activations import is_piecewise_linear

_FUSED = {"enable_fp_fusion": True}  # a product and a sum are rounded once, as in CUDA; Triton 3.10 will not by itself
_FINISH = {"CHANNELS": FINISH_CHANNELS, "SPLITS": FINISH_SPLITS, **_FUSED}


def batch_norm_train(
    input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, activation,
    save_mask, activation_param=None,
):  # fmt: skip
    operands = Operands("batch_norm_train", input)
    residual = operands.dense("residual", residual)
    name, param = operands.activation(activation, activation_param)
    weight, bias = operands.vector("weight", weight), operands.vector("bias", bias)
    running_mean, running_var = _running(operands, running_mean, running_var)
    counter = operands.counter("num_batches_tracked", num_batches_tracked)
    output, mean, inv_std = operands.empty_elements(), *(operands.empty(operands.channels) for _ in range(2))
    mask = _empty_mask(operands, activation, save_mask)
    is_cumulative = momentum is None
    momentum = 0.0 if is_cumulative else momentum
    x, layout = operands.input, operands.layout
    with _device_of(x):
        if layout.numel == 0:
            mean.zero_()
            inv_std.fill_(1 / math.sqrt(eps))
            _count(counter)
            return output, mean, inv_std, mask
        limits = _limits(operands, "forward")
        blocks = plans.resident(layout, x.dtype, 1, limits)
        buffers = (running_mean, running_var, counter, momentum, eps)
        if blocks is not None:
            resident_forward_kernel[blocks.programs,](
                x, residual, output, _or_none(mask), weight, bias, mean, inv_std, *buffers, param,
                *_walk(layout, blocks), TILE=blocks.tile, ACTIVATION=name, IS_CUMULATIVE=is_cumulative,
                **_options(blocks),
            )  # fmt: skip
            if is_cumulative:
                _count(counter)
        else:
            blocks = plans.split(layout, x.dtype, limits)
            _moments(operands, blocks, mean, inv_std, None, *buffers, is_cumulative)
            _normalize(
                operands, blocks, residual, output, mask, weight, bias, mean, inv_std, None, None, 0.0, name, param
            )
    return output, mean, inv_std, mask


def batch_norm_eval(input, residual, weight, bias, running_mean, running_var, eps, activation, activation_param=None):
    return _frozen(
        "batch_norm_eval", input, residual, weight, bias, running_mean, running_var, eps, activation, False,
        activation_param, saves=False,
    )[0]  # fmt: skip


def batch_norm_frozen(
    input, residual, weight, bias, running_mean, running_var, eps, activation, save_mask, activation_param=None
):
    return _frozen(
        "batch_norm_frozen", input, residual, weight, bias, running_mean, running_var, eps, activation, save_mask,
        activation_param, saves=True,
    )  # fmt: skip


def _frozen(
    op, input, residual, weight, bias, running_mean, running_var, eps, activation, save_mask, activation_param, saves
):
    operands = Operands(op, input)
    residual = operands.dense("residual", residual)
    name, param = operands.activation(activation, activation_param)
    weight, bias = operands.vector("weight", weight), operands.vector("bias", bias)
    running_mean, running_var = _running(operands, running_mean, running_var)
    output = operands.empty_elements()
    mean, inv_std = (operands.empty(operands.channels) if saves else None for _ in range(2))
    mask = _empty_mask(operands, activation, save_mask)
    blocks = _blocks(operands, "forward")
    with _device_of(operands.input):
        _normalize(
            operands, blocks, residual, output, mask, weight, bias, mean, inv_std, running_mean, running_var, eps,
            name, param,
        )  # fmt: skip
    return output, mean, inv_std, mask


def normalize(input, residual, weight, bias, mean, inv_std, activation, save_mask, activation_param=None):
    operands = Operands("normalize", input)
    residual = operands.dense("residual", residual)
    name, param = operands.activation(activation, activation_param)
    weight, bias = operands.vector("weight", weight), operands.vector("bias", bias)
    mean, inv_std = operands.float64("mean", mean), operands.float64("inv_std", inv_std)
    output, mask = operands.empty_elements(), _empty_mask(operands, activation, save_mask)
    blocks = _blocks(operands, "forward")
    with _device_of(operands.input):
        _normalize(operands, blocks, residual, output, mask, weight, bias, mean, inv_std, None, None, 0.0, name, param)
    return output, mask


def channel_stats(input):
    operands = Operands("channel_stats", input)
    mean, var = (operands.empty(operands.channels) for _ in range(2))
    if operands.layout.numel == 0:
        return mean.zero_(), var.zero_()
    blocks = _blocks(operands, "forward")
    with _device_of(operands.input):
        _moments(operands, blocks, mean, None, var, None, None, None, 0.0, 0.0, False)
    return mean, var


def batch_norm_backward(
    grad_out, input, residual, mask, weight, bias, mean, inv_std, batch_stats, activation, need_input, need_weight,
    need_bias, need_residual, activation_param=None,
):  # fmt: skip
    operands, tensors, vectors, name, param = _backward_operands(
        "batch_norm_backward", grad_out, input, residual, mask, weight, bias, mean, inv_std, activation,
        activation_param,
    )  # fmt: skip
    x, layout = operands.input, operands.layout
    dtype = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    grad_weight = operands.empty(operands.channels if need_weight else 0, dtype=dtype)
    grad_bias = operands.empty(operands.channels if need_bias else 0, dtype=dtype)
    grad_input = operands.empty_elements() if need_input else operands.empty(0, dtype=x.dtype)
    grad_residual = operands.empty_elements() if need_residual else operands.empty(0, dtype=x.dtype)
    results = grad_input, grad_weight, grad_bias, grad_residual
    with _device_of(x):
        if layout.numel == 0:
            grad_weight.zero_()
            grad_bias.zero_()
            return results
        limits = _limits(operands, "backward")
        blocks = plans.resident(layout, x.dtype, 2, limits)
        if blocks is not None:
            resident_backward_kernel[blocks.programs,](
                *tensors, *vectors, *map(_or_none, results), param, *_walk(layout, blocks), TILE=blocks.tile,
                ACTIVATION=name, IS_FROZEN=not batch_stats, **_options(blocks),
            )  # fmt: skip
            return results
        blocks, sums = plans.split(layout, x.dtype, limits), (None, None)
        if need_weight or need_bias or (need_input and batch_stats):
            if batch_stats:
                sums = operands.empty(operands.channels), operands.empty(operands.channels)
            _grad_sums(
                operands, blocks, tensors, vectors, name, param, *sums, _or_none(grad_weight), _or_none(grad_bias)
            )
        if need_input or need_residual:
            _input_grad(operands, blocks, tensors, vectors, *sums, None, grad_input, grad_residual, name, param)
    return results


def grad_sums(grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param=None):
    operands, tensors, vectors, name, param = _backward_operands(
        "grad_sums", grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param
    )
    sums = operands.empty(operands.channels), operands.empty(operands.channels)
    if operands.layout.numel == 0:
        return sums[0].zero_(), sums[1].zero_()
    blocks = _blocks(operands, "backward")
    with _device_of(operands.input):
        _grad_sums(operands, blocks, tensors, vectors, name, param, *sums, None, None)
    return sums


def input_grad(
    grad_out, input, residual, mask, weight, bias, mean, inv_std, sum_grad, sum_grad_xhat, count, activation,
    need_residual, activation_param=None,
):  # fmt: skip
    operands, tensors, vectors, name, param = _backward_operands(
        "input_grad", grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param
    )
    given = [t is not None for t in (sum_grad, sum_grad_xhat, count)]
    if any(given) and not all(given):
        operands.fail("expected all of sum_grad, sum_grad_xhat and count, or none, got some")
    sums = operands.float64("sum_grad", sum_grad), operands.float64("sum_grad_xhat", sum_grad_xhat)
    count = operands.float64("count", count, 1)
    grad_input = operands.empty_elements()
    grad_residual = operands.empty_elements() if need_residual else operands.empty(0, dtype=operands.input.dtype)
    blocks = _blocks(operands, "backward")
    with _device_of(operands.input):
        _input_grad(operands, blocks, tensors, vectors, *sums, count, grad_input, grad_residual, name, param)
    return grad_input, grad_residual


def _blocks(operands: Operands, direction: str) -> Blocks:
    """Return the plan of a pass over the operands."""
    return plans.split(operands.layout, operands.input.dtype, _limits(operands, direction))


def _limits(operands: Operands, direction: str) -> plans.Limits:
    return limits_of(operands.input.device, operands.layout, operands.input.dtype, direction)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a guard that makes a tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _or_none(tensor: Tensor | None) -> Tensor | None:
    """Return a result, or None in place of the empty tensor that stands for one that is not wanted."""
    return None if tensor is None or tensor.numel() == 0 else tensor


def _options(blocks: Blocks) -> dict[str, Any]:
    """Return what Triton compiles a kernel with."""
    return {"num_warps": blocks.warps, **_FUSED}


def _walk(layout: Layout, blocks: Blocks) -> tuple[int, int, int]:
    return layout.outer, layout.channels, blocks.run_units


def _running(operands: Operands, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return operands.vector("running_mean", mean), operands.vector("running_var", var)


def _empty_mask(operands: Operands, activation: int, save_mask: bool) -> Tensor:
    is_masked = save_mask and is_piecewise_linear(activation)
    return operands.empty_mask() if is_masked else operands.empty(0, dtype=torch.uint8)


def _count(counter: Tensor | None) -> None:
    if counter is not None:
        count_kernel[1,](counter)


def _moments(operands, blocks, mean, inv_std, var, running_mean, running_var, counter, momentum, eps, is_cumulative):
    """Launch the kernels that sum the input and write its statistics."""
    x, layout = operands.input, operands.layout
    partials = operands.empty(2, blocks.splits, layout.channels)
    walk = _walk(layout, blocks)
    moments_kernel[blocks.programs,](
        x, partials, counter, *walk, blocks.tiles, blocks.splits, blocks.rows_per_split, TILE=blocks.tile,
        **_options(blocks),
    )  # fmt: skip
    finish_moments_kernel[math.ceil(layout.channels / FINISH_CHANNELS),](
        x, partials, mean, inv_std, var, running_mean, running_var, counter, momentum, eps, *walk, blocks.splits,
        TILE=blocks.tile, IS_CUMULATIVE=is_cumulative, **_FINISH,
    )  # fmt: skip


def _normalize(
    operands, blocks, residual, output, mask, weight, bias, mean, inv_std, running_mean, running_var, eps, name, param
):
    layout = operands.layout
    if layout.numel == 0 and mean is None:
        return
    normalize_kernel[blocks.programs,](
        operands.input, residual, output, _or_none(mask), weight, bias, mean, inv_std, running_mean, running_var, eps,
        param, *_walk(layout, blocks), blocks.tiles, blocks.rows_per_split, TILE=blocks.tile, ACTIVATION=name,
        **_options(blocks),
    )  # fmt: skip


def _backward_operands(op, grad_out, input, residual, mask, weight, bias, mean, inv_std, activation, activation_param):
    """Check the arguments that backward ops share: (operands, elements, numbers per channel, activation, parameter).

    What forward saved may have any strides, since hooks on saved tensors may change them.
    """
    operands = Operands(op, input)
    name, param = operands.activation(activation, activation_param)
    mask = operands.mask(mask) if is_piecewise_linear(activation) else None
    grad_out = operands.dense("grad_out", grad_out)
    weight, bias = operands.vector("weight", weight, True), operands.vector("bias", bias, True)
    mean, inv_std = operands.float64("mean", mean, None, True), operands.float64("inv_std", inv_std, None, True)
    residual = operands.dense("residual", residual) if name != "none" and mask is None else None
    return operands, (grad_out, operands.input, residual, mask), (weight, bias, mean, inv_std), name, param


def _grad_sums(operands, blocks, tensors, vectors, name, param, sum_grad, sum_grad_xhat, grad_weight, grad_bias):
    """Launch the kernels that sum the gradients, and write the sums or the gradients of parameters."""
    layout, (_, _, mean, inv_std) = operands.layout, vectors
    partials = operands.empty(2, blocks.splits, layout.channels)
    grad_sums_kernel[blocks.programs,](
        *tensors, *vectors, partials, param, *_walk(layout, blocks), blocks.tiles, blocks.splits,
        blocks.rows_per_split, TILE=blocks.tile, ACTIVATION=name, **_options(blocks),
    )  # fmt: skip
    finish_grad_sums_kernel[math.ceil(layout.channels / FINISH_CHANNELS),](
        partials, mean, inv_std, sum_grad, sum_grad_xhat, grad_weight, grad_bias, layout.channels, blocks.splits,
        TILE=blocks.tile, **_FINISH,
    )  # fmt: skip


def _input_grad(
    operands, blocks, tensors, vectors, sum_grad, sum_grad_xhat, count, grad_input, grad_residual, name, param
):
    layout = operands.layout
    if layout.numel == 0:
        return
    input_grad_kernel[blocks.programs,](
        *tensors, *vectors, sum_grad, sum_grad_xhat, count, _or_none(grad_input), _or_none(grad_residual), param,
        *_walk(layout, blocks), blocks.tiles, blocks.rows_per_split, TILE=blocks.tile, ACTIVATION=name,
        **_options(blocks),
    )  # fmt: skip
