"""What fastbn is to torch.jit.script: torch's own operations, in the part of Python that TorchScript compiles."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, NoReturn, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def in_place_of(original: Any, function: Any) -> Any:
    """Return `function`, a method that uses no globals of its module, as one that is `original` to torch.jit.script.

    TorchScript compiles the source of what a function wraps, and looks names up in the globals of the function itself.
    """
    if isinstance(original, FunctionType):
        scope = original.__globals__
        function = FunctionType(function.__code__, scope, None, function.__defaults__, function.__closure__)
    return functools.update_wrapper(function, original)


def refuse(layer: Any) -> NoReturn:
    """Raise TypeError: for `__prepare_scriptable__` of a layer whose training TorchScript cannot compile."""
    raise TypeError(
        f"torch.jit.script: expected layers with a form in TorchScript, got {type(layer).__name__}, whose training "
        "has none; torch.jit.trace takes it in evaluation"
    )


def activate(z: Tensor, name: str, param: Optional[float]) -> Tensor:  # noqa: UP045
    """Return the activation of that name; param is the slope of leaky_relu or the alpha of elu."""
    if name == "relu":
        return torch.relu(z)
    if name == "leaky_relu":
        return F.leaky_relu(z, 0.01 if param is None else param)
    if name == "relu6":
        return F.relu6(z)
    if name == "elu":
        return F.elu(z, 1.0 if param is None else param)
    if name == "silu":
        return F.silu(z)
    if name == "gelu":
        return F.gelu(z)
    if name == "hardswish":
        return F.hardswish(z)
    if name == "hardsigmoid":
        return F.hardsigmoid(z)
    if name == "mish":
        return F.mish(z)
    if name == "softplus":
        return F.softplus(z)
    if name == "sigmoid":
        return torch.sigmoid(z)
    if name == "tanh":
        return torch.tanh(z)
    if name == "none":
        return z
    raise ValueError("activation: expected a name that fastbn knows, got " + name)


def batch_norm(
    input: Tensor,
    residual: Optional[Tensor],  # noqa: UP045
    weight: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    num_batches_tracked: Optional[Tensor],  # noqa: UP045
    training: bool,
    momentum: Optional[float],  # noqa: UP045
    eps: float,
    activation: Optional[str],  # noqa: UP045
    activation_param: Optional[float],  # noqa: UP045
) -> Tensor:
    """Return what the layer returns; num_batches_tracked is None where nothing is counted."""
    factor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if residual is not None:
        output = output + residual
    return output if activation is None else activate(output, activation, activation_param)
