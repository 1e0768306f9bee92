"""The activations that can be fused behind the normalisation, in the order that the ops number them."""

from __future__ import annotations

ACTIVATIONS = ("none", "relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "hardswish")

# Their derivative is known from one bit an element, which the mask holds.
PIECEWISE_LINEAR = frozenset({"relu", "leaky_relu", "relu6"})


def index(name: str | None) -> int:
    """The number that the ops know an activation by; None is "none". ValueError for an unknown name."""
    if name is None:
        return 0
    try:
        return ACTIVATIONS.index(name)
    except ValueError:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}") from None


def is_piecewise_linear(activation: int) -> bool:
    return ACTIVATIONS[activation] in PIECEWISE_LINEAR
