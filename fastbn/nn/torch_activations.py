"""What torch's functions, methods and modules are as an activation of the ops, and how users may write one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbn.ops.activations import ACTIVATIONS as NAMES
from fastbn.ops.activations import ROWS, Name, check_param, index

Known: TypeAlias = "tuple[str, float | None] | None"  # name and parameter of an activation of the ops; None: not known
# What a layer takes as its activation: `read_activation`.
ActivationLike: TypeAlias = "Name | str | nn.Module | type[nn.Module] | Callable[..., Tensor] | None"


def _not_negative(name: str, param: Any) -> Known:
    """Return (name, param) if it is a number that torch takes in place too."""
    return (name, float(param)) if isinstance(param, (float, int)) and param >= 0 else None


def _relu(inplace: bool = False) -> Known:
    return ("relu", None)


def _relu6(inplace: bool = False) -> Known:
    return ("relu6", None)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Known:
    return _not_negative("leaky_relu", negative_slope)


def _elu(alpha: float = 1.0, inplace: bool = False) -> Known:
    return _not_negative("elu", alpha)


def _silu(inplace: bool = False) -> Known:
    return ("silu", None)


def _gelu(approximate: str = "none") -> Known:
    return ("gelu", None) if approximate == "none" else None


def _hardswish(inplace: bool = False) -> Known:
    return ("hardswish", None)


def _hardsigmoid(inplace: bool = False) -> Known:
    return ("hardsigmoid", None)


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Known:
    return ("relu6", None) if min_val == 0 and max_val == 6 else None


def _mish(inplace: bool = False) -> Known:
    return ("mish", None)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Known:
    return ("softplus", None) if beta == 1 and threshold == 20 else None


def _sigmoid() -> Known:
    return ("sigmoid", None)


def _tanh() -> Known:
    return ("tanh", None)


FUNCTIONS: dict[Any, Callable[..., Known]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.relu6: _relu6,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.elu: _elu,
    F.elu_: _elu,
    F.silu: _silu,
    F.gelu: _gelu,
    F.hardswish: _hardswish,
    F.hardsigmoid: _hardsigmoid,
    F.hardtanh: _hardtanh,
    F.mish: _mish,
    F.softplus: _softplus,
    F.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    F.tanh: _tanh,
    torch.tanh: _tanh,
}
METHODS: dict[str, Callable[..., Known]] = {
    "relu": _relu,
    "relu_": _relu,
    "sigmoid": _sigmoid,
    "sigmoid_": _sigmoid,
    "tanh": _tanh,
    "tanh_": _tanh,
}
# What an activation module of exactly this type is. `fastbn.transforms.register` adds others.
ACTIVATIONS: dict[type, Callable[[Any], Known]] = {
    nn.ReLU: lambda m: ("relu", None),
    nn.ReLU6: lambda m: ("relu6", None) if m.min_val == 0 and m.max_val == 6 else None,
    nn.Hardtanh: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.ELU: lambda m: _elu(m.alpha),
    nn.SiLU: lambda m: ("silu", None),
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.Hardswish: lambda m: ("hardswish", None),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", None),
    nn.Mish: lambda m: ("mish", None),
    nn.Softplus: lambda m: _softplus(m.beta, m.threshold),
    nn.Sigmoid: lambda m: ("sigmoid", None),
    nn.Tanh: lambda m: ("tanh", None),
}


def read_activation(activation: ActivationLike, param: float | None) -> tuple[str | None, float | None]:
    """Return (name, parameter) of an activation; None for no activation, and for torch's default of the parameter.

    activation: a name of the ops in any of its spellings ("relu", "ReLU", "swish"), one of torch's modules or its class
    (nn.ReLU(), nn.LeakyReLU), one of torch's functions (F.relu), or None. param: the parameter, where that has none.

    Raises ValueError for anything else, for a module whose settings the ops do not have, and for a parameter that does
    not fit.
    """
    if activation is None or isinstance(activation, str):
        number = index(activation)
        param = check_param(number, param)
        return (NAMES[number] if number else None), param
    module = activation() if isinstance(activation, type) and issubclass(activation, nn.Module) else activation
    if type(module) is nn.Identity:
        return None, check_param(0, param)
    if isinstance(module, nn.Module):
        reads = ACTIVATIONS.get(type(module))
        known = None if reads is None else reads(module)
    else:
        function = FUNCTIONS.get(module) if callable(module) else None
        known = None if function is None else function()
    if known is None:
        raise ValueError(f"activation: expected one of {', '.join(NAMES)}, or torch's module of it, got {activation!r}")
    name, own = known
    row = ROWS[index(name)]
    if own is not None and own != row.default_param:
        if param is not None:
            raise ValueError(f"activation_param: expected None beside {activation!r}, which has one, got {param!r}")
        param = own
    return name, check_param(index(name), param)
