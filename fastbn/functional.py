"""fastbn.functional.batch_norm: torch.nn.functional.batch_norm with residual, activation and counter fused in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.autograd import batch_norm as fused
from fastbn.backends import registry
from fastbn.backends.reference.activations import activation as activate
from fastbn.ops import dispatch
from fastbn.ops.activations import index as activation_index


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(batch_norm(input) + residual) in one op, as `torch.nn.functional.batch_norm` otherwise.

    input: (N, C, *), float32, float64, bfloat16 or float16, any strides. The result has its shape, dtype and suggested
    memory format. weight, bias, running_mean, running_var: (C,), the dtype of input, or float32 beside a half type.
    training: normalise by the biased statistics of the batch and move the running ones, if given, by `momentum`
    (`running = (1 - momentum) * running + momentum * batch`, unbiased variance); else normalise by the running ones.
    residual: the shape, dtype and device of input. activation: None, "relu", "leaky_relu", "relu6", "elu", "silu",
    "gelu" or "hardswish", with torch's default parameters.
    num_batches_tracked: int64 of one element, incremented in training; with momentum None the statistics move by
    1 / num_batches_tracked, which makes them the average over all batches.
    backend: "cpu", "cuda", "reference" or "torch"; None takes the fastest that can, and torch's own where none can, or
    where torch's transforms (export, functorch, forward-mode AD) must see through the layer.

    Raises what torch raises for the same input, before any buffer has changed (but what hooks on saved tensors raise),
    and ValueError for a residual or activation that does not fit and for a named backend that cannot take the call.
    """
    index = activation_index(activation)
    if residual is not None:
        _check_residual(input, residual)
    if not training:
        num_batches_tracked = None
    statistics = running_mean, running_var
    operands = (input, residual, weight, bias, *statistics, num_batches_tracked, training, momentum, eps, index)
    if backend is None and type(input) is Tensor and not torch.compiler.is_compiling():
        # The ops look at every operand anyway: asking first, why they would refuse, takes 3 us.
        reason = dispatch.why_torch_must_see(*operands[:6]) or dispatch.why_left_to_torch(
            input, *statistics, num_batches_tracked, training, momentum, eps
        )
        if reason is None:
            backend = registry.backend_of(input)
        if backend is not None:
            try:
                return fused.batch_norm(*operands, backend)
            except RuntimeError:
                refused = dispatch.why_refused(input, *statistics, weight, bias, num_batches_tracked)
                if refused is None and not dispatch.cannot_be_saved(operands[:6]):
                    raise
        return _torch_batch_norm(*operands)
    tensors, numbers = (input, *statistics, weight, bias, num_batches_tracked), (training, momentum, eps)
    if backend is None:
        backend = "torch" if dispatch.why_torch_must_see(*operands[:6]) else _choose_backend(*tensors, *numbers)
    elif backend != "torch":
        _check_backend(backend, *tensors, *numbers)
    return _torch_batch_norm(*operands) if backend == "torch" else fused.batch_norm(*operands, backend)


def _choose_backend(input, *rest) -> str:
    return "torch" if dispatch.why_unsupported(input, *rest) else registry.backend_of(input) or "torch"


def _check_backend(backend: str, input: Tensor, *rest) -> None:
    reason = registry.why_unavailable(backend, input.device) or dispatch.why_unsupported(input, *rest)
    if reason is not None:
        raise ValueError(f"batch_norm: backend {backend!r} cannot take this call: {reason}")


def _check_residual(input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(f"batch_norm: expected residual of shape {list(input.shape)}, got {list(residual.shape)}")
    if residual.dtype != input.dtype:
        raise ValueError(f"batch_norm: expected residual of dtype {input.dtype}, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"batch_norm: expected residual on {input.device}, got {residual.device}")


def _torch_batch_norm(
    input, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, index
) -> Tensor:
    counts = num_batches_tracked is not None
    factor = momentum
    if momentum is None:
        factor = 1.0 / float(num_batches_tracked + 1) if counts else 0.0
    if counts and not torch.compiler.is_compiling() and num_batches_tracked.is_inference():
        num_batches_tracked.add_(0)  # raises what counting would raise after the averages had moved
    if training and weight is not None and bias is not None and weight.dtype != bias.dtype:
        # torch compares the two after it has moved the averages: so first with copies of them.
        copies = (t if t is None else t.clone() for t in (running_mean, running_var))
        F.batch_norm(input, *copies, weight, bias, True, factor, eps)
    # torch's backward of (N, C) reads beside a vector that is not contiguous.
    weight, bias = _contiguous(weight), _contiguous(bias)
    if not training:
        running_mean, running_var = _contiguous(running_mean), _contiguous(running_var)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    output = activate(output if residual is None else output + residual, index)
    if counts:  # after all that may raise
        num_batches_tracked.add_(1)
    return output


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()
