"""Checks of a layer's settings and mode, beside those of the model that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastbn.inspect.doctor.faults import Finding, finding
from fastbn.inspect.doctor.layers import is_frozen, norms_of, setting
from fastbn.inspect.doctor.twins import Twins

# From here on a momentum is taken for that of a framework in which it weights the old value.
LARGE_MOMENTUM = 0.9


def check_settings(name: str, norm: Any) -> Iterator[Finding]:
    """Yield what is wrong with eps, momentum and tracking of one BatchNorm."""
    eps, momentum = setting(norm, "eps"), setting(norm, "momentum")
    if isinstance(eps, (int, float)) and not eps > 0:
        yield finding("zero-eps", name, f"eps is {eps:g}")
    if is_frozen(norm):
        return
    if norm.running_mean is None:
        yield finding("untracked-statistics", name, "the layer has no running statistics")
    elif isinstance(momentum, (int, float)):
        if momentum == 0:
            yield finding("zero-momentum", name, "momentum is 0")
        elif momentum >= LARGE_MOMENTUM:
            yield finding("large-momentum", name, f"momentum is {momentum:g}")


def check_modes(twins: Twins) -> Iterator[Finding]:
    """Yield layers whose mode is not that of the model, or that train half."""
    for name, norm in norms_of(twins.make()).items():
        if is_frozen(norm) or norm.running_mean is None:
            continue
        if twins.as_given[""] and not twins.as_given[name] and twins.after_train[name]:
            yield finding("frozen-by-eval", name, "the layer is in evaluation mode, the model in training mode")
        elif twins.examined[name] and not twins.examined[""]:
            yield finding("training-in-eval", name, "the layer is in training mode, the model in evaluation mode")
        elif twins.examined[name] and _has_constant_parameters(norm):
            yield finding("half-frozen", name, "weight and bias are not trained, but the running statistics move")


def _has_constant_parameters(norm: nn.Module) -> bool:
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
