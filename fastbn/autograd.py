"""Batch normalisation with residual and activation as one autograd function: forward and backward are one op each."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastbn import _formulas, _ops
from fastbn._activations import is_piecewise_linear


def _below_autograd():
    """Eager calls go straight to the kernel: the op's own autograd wrapper costs time and would bump the version of the
    running statistics, which torch's BatchNorm does not. Compilers trace the call as it is."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowADInplaceOrView()


def batch_norm(input, residual, weight, bias, *rest) -> Tensor:
    """activation(batch_norm(input) + residual), updating the buffers; the arguments of `BatchNormFunction`."""
    tensors = (input, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return BatchNormFunction.apply(*tensors, *rest)
    return _forward(*tensors, *rest, save_stats=False, save_mask=False)[0]


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    batch_stats: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    backend: str,
    *,
    save_stats: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops = _ops.namespace(backend)
    operands = (input, residual, weight, bias, running_mean, running_var)
    with _below_autograd():
        if batch_stats:
            return ops.batch_norm_train(*operands, num_batches_tracked, momentum, eps, activation, save_mask)
        return ops.batch_norm_eval(*operands, eps, activation, save_stats, save_mask)


class BatchNormFunction(torch.autograd.Function):
    """output = activation(batch_norm(input) + residual), updating the buffers.

    Arguments are those of the ops (docs/design.md): `batch_stats` chooses between the statistics of the batch and the
    running ones, `activation` is an index, `backend` a name that `fastbn._ops.namespace` knows. Differentiable any
    number of times in input, residual, weight and bias; the first derivative is an op, later ones torch compositions.
    """

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        input, residual, weight, bias, _, _, _, batch_stats, _, eps, activation, backend = arguments
        masked = residual is not None and is_piecewise_linear(activation) and _ops.saves_mask(backend, input)
        output, mean, inv_std, mask = _forward(*arguments, save_stats=True, save_mask=masked)
        # Frozen statistics need the input only for the gradient of weight, or to find the activation's derivative.
        recomputes = activation != 0 and not masked
        needs_input_data = batch_stats or ctx.needs_input_grad[2] or recomputes
        ctx.save_for_backward(
            input if needs_input_data else None,
            residual if recomputes else None,
            weight,
            bias if recomputes else None,
            mean,
            inv_std,
            mask if masked else None,
        )
        ctx.batch_stats, ctx.eps, ctx.activation, ctx.backend = batch_stats, eps, activation, backend
        ctx.memory_format = None if needs_input_data else _formulas.suggest_memory_format(input)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        input, residual, weight, bias, mean, inv_std, mask = ctx.saved_tensors
        need_input, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if input is None:  # only its shape and format matter
            input = grad_out.detach().contiguous(memory_format=ctx.memory_format)
        if weight is None and bias is None and ctx.bias_dtype is not None:  # only its dtype matters: its gradient's
            bias = mean.new_empty(mean.shape, dtype=ctx.bias_dtype)
        if torch.is_grad_enabled():
            grads = _differentiable_backward(ctx, grad_out, input, residual, weight, bias, mean, inv_std, mask)
        else:
            # Without an activation the gradient of the residual is grad_out itself.
            kernel_residual = need_residual and ctx.activation != 0
            with _below_autograd():
                grads = _ops.namespace(ctx.backend).batch_norm_backward(
                    grad_out,
                    input,
                    residual,
                    mask,
                    weight,
                    bias,
                    mean,
                    inv_std,
                    ctx.batch_stats,
                    ctx.activation,
                    need_input,
                    need_weight,
                    need_bias,
                    kernel_residual,
                )
        grad_input, grad_weight, grad_bias, grad_residual = grads
        if ctx.activation == 0:
            grad_residual = grad_out
        return (
            grad_input if need_input else None,
            grad_residual if need_residual else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 8,
        )


def _differentiable_backward(ctx, grad_out, input, residual, weight, bias, mean, inv_std, mask):
    stats = {"eps": ctx.eps} if ctx.batch_stats else {"mean": mean, "inv_std": inv_std}
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return _formulas.backward_formula(
        grad_out, input, residual, mask, weight, bias, ctx.activation, dtype=dtype, **stats
    )
