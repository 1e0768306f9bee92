"""fastbn.functional.batch_norm: torch.nn.functional.batch_norm with residual, activation and counter fused in.

Also its parts, for statistics of more than one batch: `channel_stats`, `merge_stats` and `normalize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.autograd import batch_norm as fused
from fastbn.autograd import from_output
from fastbn.autograd.moments import channel_stats, merge_stats, normalize
from fastbn.autograd.statistics import Moments
from fastbn.backends import aten, registry
from fastbn.backends.node import NODE
from fastbn.backends.registry import Name as BackendName
from fastbn.ops.activations import Name as ActivationName
from fastbn.ops.activations import check_param
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Call, check_residual

__all__ = ["Moments", "batch_norm", "channel_stats", "merge_stats", "normalize"]


def check_save(save: str) -> None:
    """Raise ValueError for anything but the values of `save`."""
    if save not in ("input", "output"):
        raise ValueError(f'save: expected "input" or "output", got {save!r}')


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
    activation: ActivationName | str | None = None,
    activation_param: float | None = None,
    num_batches_tracked: Tensor | None = None,
    save: str = "input",
    backend: BackendName | str | None = None,
) -> Tensor:
    """Return activation(batch_norm(input) + residual) in one op; otherwise as `torch.nn.functional.batch_norm`.

    input: (N, C, *), float32, float64, bfloat16 or float16, any strides. The result has its shape, dtype and suggested
    memory format. weight, bias, running_mean, running_var: (C,), the dtype of input, or float32 beside a half type.
    training: normalise by the biased statistics of the batch and move the running ones, if given, by `momentum`
    (`running = (1 - momentum) * running + momentum * batch`, unbiased variance); else normalise by the running ones.
    residual: the shape, dtype and device of input. activation: None or one of "relu", "leaky_relu", "relu6", "elu",
    "silu", "gelu", "hardswish", "hardsigmoid", "mish", "softplus", "sigmoid", "tanh". activation_param: the slope of
    leaky_relu below 0, or the alpha of elu; None for torch's default, and for the others.
    num_batches_tracked: int64 of one element, incremented in training; with momentum None the statistics move by
    1 / num_batches_tracked, which makes them the average over all batches.
    save: what is kept for backward: "input", or "output" where that spares memory, because the next operation keeps the
    output in any case. Without a residual, and without an activation or with a leaky_relu whose slope is above 0, the
    input is recovered from it, which expects |bias| <= 4 |weight| and |weight| times the slope above 2**-14 in each
    channel (fastbn's layers see to that); with a residual and relu or leaky_relu it replaces the mask. Then
    changing the output in place, or create_graph, makes backward raise RuntimeError. Otherwise, and under
    torch.compile, the input is kept.
    backend: "cpu", "cuda", "triton", "reference" or "torch"; None takes the fastest that can, and torch's own where
    none can, or where torch's transforms (export, functorch, forward-mode AD) must see through the layer.

    Raises what torch raises for the same input, before any buffer has changed (but what hooks on saved tensors raise),
    and ValueError for a residual, activation, activation_param or save that does not fit, and for a named backend that
    cannot take the call.
    """
    check_save(save)
    index = activation_index(activation)
    # Answers as the rest of this function would, some 10 to 20 us sooner; None for calls that are not usual.
    if NODE is not None and backend is None and save == "input" and not torch.compiler.is_compiling():
        output = NODE.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual,
            index,
            activation_param,
            num_batches_tracked,
        )
        if output is not None:
            return output
    call = Call(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked if training else None,
        momentum,
        eps,
        index,
        training,
        None if activation_param is None else check_param(index, activation_param),
    )
    if residual is not None:
        check_residual(input, residual)
    chosen, _ = registry.choose(call, backend)
    if chosen.ops is not None:
        try:
            return (from_output if save == "output" else fused).batch_norm(call, chosen)
        except RuntimeError:
            if registry.choose(call, backend, ask_all=True)[0] is chosen:
                raise
    return aten.batch_norm(call)
