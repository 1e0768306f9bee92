"""One forward pass of a copy of a model: how often each BatchNorm is called, and with what.

In it BatchNorms normalise by the batch without weight and bias, and keep no statistics, so that a fault of one cannot
hide what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbn.inspect.doctor.faults import Finding, finding
from fastbn.inspect.doctor.layers import is_frozen, norms_of, uses_batch
from fastbn.inspect.doctor.twins import device_of, dtype_of

# With fewer values per channel the variance of a batch has a relative error above a third: sqrt(2 / (n - 1)).
MIN_VALUES = 16


class Seen(NamedTuple):
    """The input of one call, and whether the layer would normalise it by its own statistics."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    by_batch: bool

    @property
    def values_per_channel(self) -> int:
        return self.shape.numel() // max(self.shape[1], 1)


def arguments_of(example: Any, model: nn.Module) -> tuple[Any, ...]:
    """Return the positional arguments of a forward: a shape becomes a random tensor of the model's dtype and device.

    Raises TypeError for what is neither a shape, a tensor nor a tuple or list of arguments.
    """
    if isinstance(example, Tensor):
        return (example,)
    if not isinstance(example, (tuple, list)) or not example:
        raise TypeError(f"doctor: expected a shape, a tensor or a tuple of arguments, got {type(example).__name__}")
    if not all(type(size) is int for size in example):
        return tuple(example)
    if any(size < 0 for size in example):
        raise ValueError(f"doctor: expected a shape of sizes of at least 0, got {list(example)}")
    device = device_of(model)
    if device.type == "meta":
        return (torch.empty(example, dtype=dtype_of(model), device=device),)
    drawn = torch.randn(example, generator=torch.Generator().manual_seed(0), device="cpu")
    return (drawn.to(device, dtype_of(model)),)


def observe(twin: nn.Module, arguments: tuple[Any, ...]) -> dict[str, list[Seen]]:
    """Return what each BatchNorm of a copy of a model is called with, by its path, in one forward pass.

    Raises ValueError if forward raises anything.
    """
    seen: dict[str, list[Seen]] = {}
    for name, norm in norms_of(twin).items():
        vars(norm)["forward"] = _recorder(norm, seen.setdefault(name, []))
    with torch.no_grad():
        try:
            twin(*arguments)
        except Exception as error:
            raise ValueError(f"doctor: the model's forward raised {type(error).__name__}: {error}") from error
    return seen


def _recorder(norm: nn.Module, calls: list[Seen]) -> Any:
    by_batch = uses_batch(norm)

    def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(input, Tensor) or input.dim() < 2:
            return input
        seen = Seen(input.shape, input.stride(), input.dtype, by_batch)
        calls.append(seen)
        if seen.values_per_channel < 2 or not input.is_floating_point():
            return input.clone()  # steps in place come after it
        return F.batch_norm(input, None, None, None, None, True, 0.0, 1e-5)

    return forward


def check_calls(twin: nn.Module, seen: dict[str, list[Seen]]) -> Iterator[Finding]:
    """Yield what is wrong with the calls that `observe` saw."""
    for name, norm in norms_of(twin).items():
        calls = seen[name]
        if len(calls) > 1 and not is_frozen(norm):
            yield finding("shared-layer", name, f"the layer is called {len(calls)} times in one forward pass")
        batches = [call for call in calls if call.by_batch]
        if not batches:
            continue
        least = min(batches, key=lambda call: call.values_per_channel)
        values, size = least.values_per_channel, "x".join(map(str, least.shape))
        if values == 1:
            yield finding("one-value-per-channel", name, f"its input of {size} has one value per channel")
        elif least.shape[0] == 1:
            yield finding("small-batch", name, f"its input of {size} is a batch of one")
        elif 1 < values < MIN_VALUES:
            yield finding("small-batch", name, f"its input of {size} has {values} values per channel")
