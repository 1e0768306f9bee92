"""The activations that can be fused after the normalisation: one row each, in the order that the ops number them.

Order, form and default parameters are those of `Activations` in csrc/math/activation.h: `check_build` compares
the two when fastbn is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An activation as torch computes it, and its derivative as differentiable torch operations.

    forward: activation(z). backward: grad_out * activation'(z) of (grad_out, z), for those that are not piecewise
    linear. The branches at the boundaries are those of torch's `*_backward` kernels, and at NaN those of the vectorised
    ones for CPUs. Where the derivative is 0 the result is 0 whatever grad_out is.
    is_upper: of a piecewise linear activation, where its derivative is 1 (the bits of the mask). Elsewhere it is the
    parameter, or 0 without one.
    default_param: torch's default of the parameter, the last argument of forward and backward; None for an activation
    that has none.
    """

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor] | None = None
    is_upper: Callable[[Tensor], Tensor] | None = None
    default_param: float | None = None

    def __post_init__(self) -> None:
        if (self.backward is None) == (self.is_upper is None):
            raise TypeError(f"{self.name}: expected one of backward and is_upper")

    @property
    def is_piecewise_linear(self) -> bool:
        return self.is_upper is not None

    def param(self, given: float | None) -> tuple[()] | tuple[float]:
        """Return the last argument of forward and backward: `given`, or torch's default; nothing without a parameter.

        Raises ValueError for a parameter of an activation that has none.
        """
        if self.default_param is not None:
            return (self.default_param if given is None else given,)
        if given is not None:
            raise ValueError(f"activation_param: expected None, since {self.name} has no parameter, got {given!r}")
        return ()


def _elu_backward(grad_out: Tensor, z: Tensor, alpha: float) -> Tensor:
    # exp of the unused branch would overflow, and its inf would make the second derivative NaN. At 0 the second
    # derivative is 0, as torch's is.
    return torch.where(z > 0, grad_out, grad_out * alpha * torch.where(z >= 0, 0.0, z).exp())


def _silu_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return grad_out * (s * (1 + z * (1 - s)))


def _gelu_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return grad_out * (0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density)


def _hardswish_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    ramp = torch.where(z >= 3, grad_out, grad_out * (z / 3 + 0.5))
    return torch.where(z <= -3, torch.zeros_like(ramp), ramp)


def _hardsigmoid_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    return torch.where((z > -3) & (z < 3), grad_out / 6, torch.zeros_like(grad_out))


def _mish_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(z))
    return grad_out * (t + z * torch.sigmoid(z) * (1 - t * t))


def _softplus_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    return torch.where(z > 20, grad_out, grad_out * torch.sigmoid(z))


def _sigmoid_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return grad_out * (s * (1 - s))


def _tanh_backward(grad_out: Tensor, z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return grad_out * (1 - t * t)


ROWS = (
    Activation("none", forward=lambda z: z, backward=lambda grad_out, z: grad_out),
    Activation("relu", forward=F.relu, is_upper=lambda z: ~(z <= 0)),
    Activation("leaky_relu", forward=F.leaky_relu, is_upper=lambda z: z > 0, default_param=0.01),
    Activation("relu6", forward=F.relu6, is_upper=lambda z: (z > 0) & (z < 6)),
    Activation("elu", forward=F.elu, backward=_elu_backward, default_param=1.0),
    Activation("silu", forward=F.silu, backward=_silu_backward),
    Activation("gelu", forward=F.gelu, backward=_gelu_backward),
    Activation("hardswish", forward=F.hardswish, backward=_hardswish_backward),
    Activation("hardsigmoid", forward=F.hardsigmoid, backward=_hardsigmoid_backward),
    Activation("mish", forward=F.mish, backward=_mish_backward),
    Activation("softplus", forward=F.softplus, backward=_softplus_backward),
    Activation("sigmoid", forward=F.sigmoid, backward=_sigmoid_backward),
    Activation("tanh", forward=F.tanh, backward=_tanh_backward),
)
ACTIVATIONS = tuple(row.name for row in ROWS)
# For editors, which complete it.
Name: TypeAlias = Literal[
    "none", "relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "hardswish", "hardsigmoid", "mish", "softplus",
    "sigmoid", "tanh",
]  # fmt: skip


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


# The name for each spelling of it, in lower case and without what joins words.
_SPELLINGS = {_letters(name): name for name in ACTIVATIONS} | {
    "swish": "silu",
    "hswish": "hardswish",
    "hsigmoid": "hardsigmoid",
    "identity": "none",
    "linear": "none",
}

# Activations whose derivative is known from one bit per element, which the mask holds.
PIECEWISE_LINEAR = frozenset(row.name for row in ROWS if row.is_piecewise_linear)


def check_build(built: Sequence[dict[str, Any]]) -> None:
    """Raise ImportError unless `built`, the activations of a build of fastbn._C, are the rows."""
    rows = [
        {
            "name": row.name,
            "is_piecewise_linear": row.is_piecewise_linear,
            "default_param": row.default_param,
        }
        for row in ROWS
    ]
    if list(built) != rows:
        raise ImportError(f"fastbn._C: expected the activations {rows}, got {list(built)}; build it again")


def index(name: str | None) -> int:
    """Return the number of an activation in the ops; None is "none".

    Names of torch's modules ("LeakyReLU") and other spellings ("swish", "hard_swish") do too. Raises ValueError for an
    unknown name.
    """
    if name is None:
        return 0
    if name in ACTIVATIONS:
        return ACTIVATIONS.index(name)
    letters = _letters(name) if isinstance(name, str) else None
    if letters not in _SPELLINGS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS.index(_SPELLINGS[letters])


def check_param(activation: int, param: float | None) -> float | None:
    """Return `param`, None for torch's default, as the ops take it.

    Raises ValueError for anything but a number, and for a parameter of an activation that has none.
    """
    if param is None:
        return None
    if isinstance(param, bool) or not isinstance(param, (float, int)):
        raise ValueError(f"activation_param: expected a number or None, got {param!r}")
    return float(*ROWS[activation].param(param))


def is_piecewise_linear(activation: int) -> bool:
    return ROWS[activation].is_piecewise_linear


def describe_fused(activation: int, residual: bool) -> str:
    """Write what follows a normalisation: "addition and relu", or "" for nothing."""
    return " and ".join(["addition"] * residual + [ACTIVATIONS[activation]] * (activation != 0))
