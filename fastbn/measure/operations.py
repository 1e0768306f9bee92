"""The operations that are timed, each with the bytes that it has to move: every tensor read or written once.

An operation is a mode and what is fused (an addition, an activation). Modes: train (training forward), train_backward
(training forward and backward), eval (running statistics, without gradients), frozen (running statistics, forward and
backward).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastbn.ops.activations import index as activation_index
from fastbn.ops.activations import is_piecewise_linear

MODES = ("train", "train_backward", "eval", "frozen")
# Those whose derivative has no jump, or one at 0, from which the inputs keep their gradients away.
ACTIVATIONS = ("relu", "leaky_relu", "elu", "silu", "gelu", "mish", "softplus", "sigmoid", "tanh")


@dataclass(frozen=True)
class Operation:
    mode: str
    activation: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        return "+".join([self.mode, *["add"] * self.residual, *([self.activation] if self.activation else [])])

    @property
    def training(self) -> bool:
        return self.mode.startswith("train")

    @property
    def backward(self) -> bool:
        return self.mode in ("train_backward", "frozen")

    def floor_bytes(self, numel: int, itemsize: int) -> int:
        """Return the bytes for tensors of `numel` elements of `itemsize` bytes: x, the output and a residual; then for
        backward grad_out, x and grad_input, and where an activation follows an addition its gradient and a bit per
        element, which forward wrote (or, for an activation that is not piecewise linear, the residual).
        """
        tensors, bits = 2 + self.residual, 0
        if self.backward:
            tensors += 3
            if self.residual and self.activation:
                tensors += 1
                if is_piecewise_linear(activation_index(self.activation)):
                    bits = 2
                else:
                    tensors += 1
        return tensors * numel * itemsize + bits * numel // 8


def _operations(*modes: str, fused: tuple[tuple[str | None, bool], ...]) -> tuple[Operation, ...]:
    return tuple(Operation(mode, activation, residual) for mode in modes for activation, residual in fused)


_PLAIN, _RELU, _ADD_RELU, _SILU = (None, False), ("relu", False), ("relu", True), ("silu", False)
OPERATIONS = (
    *_operations("train", "train_backward", fused=(_PLAIN, _RELU, _ADD_RELU, _SILU)),
    *_operations("eval", fused=(_PLAIN, _RELU)),
    *_operations("frozen", fused=(_PLAIN,)),
)


def parse(name: str) -> Operation:
    """Return the operation of that name: a mode, then perhaps +add, then perhaps + and an activation of ACTIVATIONS.

    Raises ValueError for another name.
    """
    mode, *fused = name.split("+")
    residual = fused[:1] == ["add"]
    rest = fused[residual:]
    if mode not in MODES or len(rest) > 1 or any(each not in ACTIVATIONS for each in rest):
        expected = f"one of {', '.join(MODES)}, then perhaps +add, then perhaps + and one of {', '.join(ACTIVATIONS)}"
        raise ValueError(f"expected {expected}, got {name!r}")
    return Operation(mode, rest[0] if rest else None, residual)
