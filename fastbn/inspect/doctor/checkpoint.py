"""Checks of a state_dict: BatchNorms are what has running_mean or running_var, wherever in a checkpoint they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastbn.inspect.doctor.faults import Finding, finding
from fastbn.inspect.doctor.values import VECTORS, check_counter, check_values, values_of

_PARTS = (*VECTORS, "num_batches_tracked")
_STATISTICS = VECTORS[:2]
# What wrappers (DataParallel, torch.compile) put before each key.
_PREFIXES = ("module.", "_orig_mod.")
_MAX_DEPTH = 4


def layers_in(checkpoint: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return the tensors of each BatchNorm by the layer's path, from a state_dict or what holds some, at any key.

    Where several are held, the paths begin with the key: "ema: layer1.bn1".
    """
    found = dict(_state_dicts(checkpoint, "", _MAX_DEPTH))
    layers = {}
    for where, tensors in found.items():
        prefix = f"{where}: " if len(found) > 1 else ""
        layers.update({prefix + path: parts for path, parts in _layers(tensors).items()})
    return layers


def check_state(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Yield what is wrong with the layers that `layers_in` returned."""
    for name, parts in layers.items():
        if missing := [part for part in _STATISTICS if part not in parts]:
            there = next(part for part in _STATISTICS if part in parts)
            yield finding("incomplete-statistics", name, f"there is {there}, but no {missing[0]}")
        values = values_of(name, parts)
        yield from check_values(values)
        yield from check_counter(values, is_used=True, others_moved=False, cumulative=None)
        if "num_batches_tracked" not in parts and not missing:
            yield finding("missing-counter", name, "there is no num_batches_tracked")


def _state_dicts(content: Mapping[Any, Any], where: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each mapping of names to tensors that has running statistics, with the keys under which it is."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if any(key.rpartition(".")[2] in _STATISTICS for key in tensors):
        yield where, tensors
    for key, value in content.items() if depth else ():
        if isinstance(value, Mapping):
            yield from _state_dicts(value, f"{where}.{key}" if where else str(key), depth - 1)


def _layers(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    prefix = ""
    while added := next((p for p in _PREFIXES if all(key.startswith(prefix + p) for key in tensors)), ""):
        prefix += added
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, part = key.removeprefix(prefix).rpartition(".")
        if part in _PARTS:
            layers.setdefault(path, {})[part] = tensor
    return {path: parts for path, parts in layers.items() if not parts.keys().isdisjoint(_STATISTICS)}
