"""Batch normalisation with residual and activation as one autograd function: forward and backward are one op each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbn import _torch
from fastbn.autograd.composite import backward_formula
from fastbn.backends import native
from fastbn.ops import dispatch, errors
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.dispatch import Backend, Call
from fastbn.ops.layout import suggest_memory_format


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Return a guard under which eager calls go straight to the kernel; compilers trace the call as it is."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _torch.below_autograd()


def batch_norm(call: Call, backend: Backend) -> Tensor:
    """Return activation(batch_norm(input) + residual) by a backend's fused ops, updating the buffers."""
    input, residual, weight, bias, running_mean, running_var, counter, momentum, eps, activation, training, param = call
    try:
        if dispatch.is_recorded(call):
            return _apply(input, residual, weight, bias, (call, backend))
        operands = input, residual, weight, bias, running_mean, running_var
        with below_autograd():
            if training:
                return backend.ops.batch_norm_train(*operands, counter, momentum, eps, activation, False, param)[0]
            return backend.ops.batch_norm_eval(*operands, eps, activation, param)
    except RuntimeError as error:
        errors.raise_of_torch(error)
        raise


def _is_masked(input: Tensor, residual: Tensor | None, activation: int, backend: Backend) -> bool:
    """Return whether a bit per element is kept for backward in place of the residual."""
    return residual is not None and is_piecewise_linear(activation) and backend.saves_mask(input)


class BatchNormFunction(torch.autograd.Function):
    """The fused op, differentiable any number of times in the first four operands of the call.

    The first derivative is an op, later ones are compositions of torch's operations. Call and backend are one argument,
    since each takes 0.25 us in either direction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        chosen: tuple[Call, Backend],
    ) -> Tensor:
        (*_, running_mean, running_var, counter, momentum, eps, activation, batch_stats, param), backend = chosen
        masked = _is_masked(input, residual, activation, backend)
        operands = input, residual, weight, bias, running_mean, running_var
        with below_autograd():
            if batch_stats:
                results = backend.ops.batch_norm_train(*operands, counter, momentum, eps, activation, masked, param)
            else:
                results = backend.ops.batch_norm_frozen(*operands, eps, activation, masked, param)
        output, mean, inv_std, mask = results
        # Frozen statistics need the input only for the gradient of weight, or to find the activation's derivative.
        recomputes = activation != 0 and not masked
        needs_input_data = batch_stats or recomputes or ctx.needs_input_grad[2]
        # Only tensors are saved, since tools that walk a graph expect no None in saved_tensors. Backward pops them.
        saved = [mean, inv_std]
        if weight is not None:
            saved.append(weight)
        if needs_input_data:
            saved.append(input)
        if masked:
            saved.append(mask)
        if recomputes:
            saved += [t for t in (bias, residual) if t is not None]
        ctx.save_for_backward(*saved)
        # Hooks on saved tensors may give back other strides. Compiled graphs are traced for those of forward.
        keeps_strides = input.is_contiguous() or torch.compiler.is_compiling()
        ctx.options = (
            (batch_stats, eps, activation, param, backend),
            (
                needs_input_data,
                masked,
                weight is not None,
                recomputes and bias is not None,
                recomputes and residual is not None,
            ),
            None if keeps_strides else input.stride(),
            None if needs_input_data else (input.shape, input.dtype, suggest_memory_format(input)),
            None if bias is None else bias.dtype,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx.saved_tensors, ctx.options, ctx.needs_input_grad, grad_out), None


def _gradients(
    saved: Sequence[Tensor], options: tuple[Any, ...], needs_input_grad: Sequence[bool], grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, residual, weight and bias from what BatchNormFunction.forward has saved."""
    (batch_stats, eps, activation, param, backend), is_saved, strides, absent_input, bias_dtype = options
    has_input, has_mask, has_weight, has_bias, has_residual = is_saved
    take: Callable[[], Any] = list(saved).pop
    residual = take() if has_residual else None
    bias = take() if has_bias else None
    mask = take() if has_mask else None
    input: Any = take() if has_input else None
    weight = take() if has_weight else None
    inv_std, mean = take(), take()
    need_input, need_residual, need_weight, need_bias = needs_input_grad[:4]
    differentiable = torch.is_grad_enabled()
    if not has_input:
        input = _stand_in(grad_out, differentiable, *absent_input)
    # Where a compiled backward asks for strides, Dynamo makes grad_out contiguous, whatever its format.
    elif not torch.compiler.is_compiling() and not (
        input.is_contiguous() if strides is None else input.stride() == strides
    ):
        input = _with_strides(input, strides)
    if weight is None and bias is None and bias_dtype is not None:  # only its dtype matters: its gradient's
        bias = mean.new_empty(mean.shape, dtype=bias_dtype)
    if differentiable:
        stats = {"eps": eps} if batch_stats else {"mean": mean, "inv_std": inv_std}
        memory_format = absent_input[2] if absent_input else suggest_memory_format(input)
        grads = _differentiable_backward(
            grad_out, input, residual, mask, weight, bias, activation, param, stats, memory_format
        )
    else:
        # Without an activation the gradient of the residual is grad_out itself.
        kernel_residual = need_residual and activation != 0
        try:
            with below_autograd():
                grads = backend.ops.batch_norm_backward(
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
                    kernel_residual,
                    param,
                )
        except RuntimeError as error:
            errors.raise_of_torch(error)
            raise
    grad_input, grad_weight, grad_bias, grad_residual = grads
    if activation == 0:
        grad_residual = grad_out
    return (
        grad_input if need_input else None,
        grad_residual if need_residual else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )


def gradients_of_node(
    saved: Sequence[Tensor],
    is_saved: tuple[bool, ...],
    strides: tuple[int, ...] | None,
    memory_format: torch.memory_format,
    bias_dtype: torch.dtype | None,
    batch_stats: bool,
    eps: float,
    activation: int,
    param: float | None,
    needs_input_grad: Sequence[bool],
    grad_out: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return `_gradients` for the function of csrc/node/function.cpp, which has saved the same tensors."""
    backend = native.CPU if grad_out.is_cpu else native.CUDA
    options = batch_stats, eps, activation, param, backend
    absent_input = None if is_saved[0] else (grad_out.shape, grad_out.dtype, memory_format)
    return _gradients(saved, (options, is_saved, strides, absent_input, bias_dtype), needs_input_grad, grad_out)


_apply_below_transforms = _torch.apply_below_transforms(BatchNormFunction)


def _apply(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, chosen: tuple[Call, Backend]
) -> Tensor:
    """Call BatchNormFunction.apply; in eager mode without its handling of functorch, which takes 1.4 us."""
    if torch.compiler.is_compiling() or _torch.has_functorch_transforms():
        apply: Any = BatchNormFunction.apply  # typed in some releases of torch
        return apply(input, residual, weight, bias, chosen)
    if dispatch.cannot_be_saved(input, residual, weight, bias, chosen[0].running_mean, chosen[0].running_var):
        raise RuntimeError("batch_norm: expected no inference tensors where gradients are recorded, got some")
    # A tensor that has outlived its functorch transform is still wrapped. (A loop would take 0.2 us.)
    unwrap = _torch.unwrap_if_dead
    return _apply_below_transforms(
        unwrap(input),
        None if residual is None else unwrap(residual),
        None if weight is None else unwrap(weight),
        None if bias is None else unwrap(bias),
        chosen,
    )


def _with_strides(saved: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """Return a saved input in the memory format that `strides`, those of forward, have (None: contiguous)."""
    if strides is None:
        return saved.contiguous()
    forward = torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device="meta")
    return saved.contiguous(memory_format=suggest_memory_format(forward))


def _stand_in(
    grad_out: Tensor, differentiable: bool, shape: torch.Size, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """Return a tensor in place of an input that was not saved, since only its shape, dtype and format matter."""
    if differentiable:  # not a second use of grad_out
        return torch.zeros((), dtype=dtype, device=grad_out.device).expand(shape)
    if not torch.compiler.is_compiling() and _torch.is_legacy_batched(grad_out):
        return grad_out  # is_grads_batched: its strides cannot be asked for, and are not those that the op gets
    return grad_out.contiguous(memory_format=memory_format)


def _differentiable_backward(
    grad_out: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    param: float | None,
    stats: dict[str, Any],
    memory_format: torch.memory_format,
) -> tuple[Tensor, ...]:
    """Return `backward_formula` in the dtype and memory format that it has to have."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    options = {"dtype": dtype, "activation_param": param, **stats}
    grads = backward_formula(grad_out, input, residual, mask, weight, bias, activation, **options)
    grad_input, *others = grads
    if not _torch.is_legacy_batched(grad_input):  # of which formats cannot be asked
        grad_input = grad_input.contiguous(memory_format=memory_format)
    return grad_input, *others
