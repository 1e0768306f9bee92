"""Checks of the numbers in a layer: running statistics, weight, bias and counter, from a module or a state_dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbn.inspect.doctor.faults import Finding, finding
from fastbn.inspect.doctor.layers import readable

# A standard deviation of 1e4, of which six and a half reach the largest number of float16.
EXPLODED_VAR = 1e8
EXPLODED_MEAN = torch.finfo(torch.float16).max


VECTORS = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class Values:
    """What a layer holds, vectors of shape (C,); None for what it has not, or what cannot be read."""

    layer: str
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    count: int | None = None  # num_batches_tracked
    eps: float = 1e-5

    @property
    def are_initial(self) -> bool:
        """Whether the running statistics are there and as `reset_running_stats` leaves them, 0 and 1."""
        mean, var = self.running_mean, self.running_var
        return mean is not None and var is not None and bool((mean == 0).all()) and bool((var == 1).all())


def values_of(layer: str, tensors: Mapping[str, Any], eps: float = 1e-5) -> Values:
    """Return the values of a layer from its parameters and buffers by their names."""
    counter = tensors.get("num_batches_tracked")
    count = int(counter) if readable(counter) and counter is not None and counter.numel() == 1 else None
    mean, var, weight, bias = (_read(tensors.get(name)) for name in VECTORS)
    return Values(layer, mean, var, weight, bias, count, eps)


def _read(tensor: Any) -> Tensor | None:
    """Return a tensor of a layer in float64 on the CPU, or None where there are no values."""
    return tensor.detach().cpu().double() if readable(tensor) else None


def check_values(values: Values) -> Iterator[Finding]:
    """Yield what is wrong with statistics and parameters by themselves, whatever the layer is used for."""
    for name in VECTORS:
        tensor = getattr(values, name)
        if tensor is not None and (wrong := _channels(~tensor.isfinite())):
            yield finding("not-finite", values.layer, f"{name} is NaN or infinite in {wrong}")
    var, mean = values.running_var, values.running_mean
    if var is not None:
        if wrong := _channels(var < 0):
            yield finding("negative-variance", values.layer, f"running_var is below 0 in {wrong}")
        if wrong := _channels(_amplified(values, var)):
            yield finding("zero-variance", values.layer, f"running_var is 0 in {wrong}")
        if wrong := _channels((var > EXPLODED_VAR) & var.isfinite()):
            yield finding("exploded-statistics", values.layer, f"running_var is above {EXPLODED_VAR:g} in {wrong}")
    if mean is not None and (wrong := _channels((mean.abs() > EXPLODED_MEAN) & mean.isfinite())):
        message = f"running_mean is beyond {EXPLODED_MEAN:g} in {wrong}"
        yield finding("exploded-statistics", values.layer, message)
    weight = values.weight
    if values.count and weight is not None and weight.numel() and not bool(weight.any()):
        yield finding("zero-weight", values.layer, f"weight is 0 in all channels after {_batches(values.count)}")


def check_counter(values: Values, *, is_used: bool, others_moved: bool, cumulative: bool | None) -> Iterator[Finding]:
    """Yield what is wrong with statistics and counter together.

    is_used: whether the statistics are what the layer normalises by, as in evaluation. others_moved: whether other
    layers of the model have seen batches. cumulative: whether momentum is None; None where that is unknown.
    """
    if values.running_var is None or values.count is None:
        return
    if values.are_initial:
        if values.count:
            message = f"running_mean is 0 and running_var 1 everywhere after {_batches(values.count)}"
            yield finding("never-updated", values.layer, message)
        elif is_used:
            yield finding("never-updated", values.layer, "no batch has moved its running statistics")
        elif others_moved:
            message = "no batch has moved its running statistics, while other layers have seen some"
            yield finding("never-updated", values.layer, message)
    elif values.count == 0:
        message = "num_batches_tracked is 0, though the running statistics have moved"
        if cumulative:
            yield finding("lost-counter", values.layer, message)
        elif cumulative is None:
            yield finding("missing-counter", values.layer, message)


def _amplified(values: Values, var: Tensor) -> Tensor:
    """Return which channels have a variance of 0, or too small for a float32, and amplify what they are given.

    Where |weight| <= sqrt(eps) they do not: that is a channel which training or pruning has switched off.
    """
    is_zero = (var >= 0) & (var < torch.finfo(torch.float32).tiny)
    if values.weight is None or values.weight.shape != var.shape:
        return is_zero
    return is_zero & (values.weight.abs() > max(values.eps, 0.0) ** 0.5)


def _channels(mask: Tensor) -> str:
    """Return "k of C channels" for the channels of a mask, "" for none."""
    count = int(mask.sum())
    return f"{count} of {mask.numel()} channels" if count else ""


def _batches(count: int) -> str:
    return f"{count} batch{'es' * (count != 1)}"
