"""Limits of the plans by measurement, instead of by rule: an option, FASTBN_TRITON_TUNE=1, off by default.

The first call of a kind of tensor (its dtype, channels, elements of a run and direction) times some variants of the
limits on random data, which takes seconds, most of them to compile. What was fastest is used from then on, for every
batch size, and is kept in a file for later processes. Results may differ in the last bits from those of the rules,
since sums are split in another way.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastbn._version import __version__
from fastbn.backends.triton import plans
from fastbn.backends.triton.plans import Layout, Limits

IS_ON = os.environ.get("FASTBN_TRITON_TUNE") == "1"
# What is changed of the limits that the rules have: less or more in flight per program, fewer or more programs, and two
# passes where one would do.
VARIANTS: tuple[dict[str, int], ...] = (
    {},
    {"block_elements": 1024},
    {"block_elements": 4096},
    {"programs_per_sm": 4},
    {"programs_per_sm": 16},
    {"resident_elements": 0},
)
# A variant has to be faster by more than the noise of a median.
_MIN_GAIN = 0.03
_tried: contextvars.ContextVar[Limits | None] = contextvars.ContextVar("tried", default=None)


def limits_of(device: torch.device, layout: Layout, dtype: torch.dtype, direction: str) -> Limits:
    """Return the limits that the plan of a call has ("forward" or "backward"), measured first if that is asked for."""
    tried = _tried.get()
    if tried is not None:
        return tried
    if IS_ON and layout.numel > 0:
        variants, key = _variants(), _key(device, layout, dtype, direction)
        if key not in variants and not _is_capturing(device):
            variants[key] = _fastest(device, layout, dtype, direction)
            _save(variants)
    return known_limits(device, layout, dtype, direction)


def known_limits(device: torch.device, layout: Layout, dtype: torch.dtype, direction: str) -> Limits:
    """Return the limits that the next call would have as far as they are known: nothing is measured."""
    limits = _limits_by_rule(device)
    if not IS_ON:
        return limits
    return dataclasses.replace(limits, **_variants().get(_key(device, layout, dtype, direction), {}))


@functools.cache
def _limits_by_rule(device: torch.device) -> Limits:
    """Return the limits of a device; those of the default GPU for tensors on none."""
    if device.type != "cuda":
        return Limits()
    return Limits(torch.cuda.get_device_properties(device).multi_processor_count)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _key(device: torch.device, layout: Layout, dtype: torch.dtype, direction: str) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{gpu} {str(dtype).removeprefix('torch.')} {layout.channels}x{layout.inner} {direction}"


def _fastest(device: torch.device, layout: Layout, dtype: torch.dtype, direction: str) -> dict[str, int]:
    """Return the variant with the lowest time, the rules' where no other is clearly faster or memory runs out."""
    tensors = 1 if direction == "forward" else 2
    times: dict[Any, tuple[float, dict[str, int]]] = {}  # by plan: variants may lead to the same one
    try:
        call = _example(device, layout, dtype, direction)
        for variant in VARIANTS:
            limits = dataclasses.replace(_limits_by_rule(device), **variant)
            plan = plans.resident(layout, dtype, tensors, limits) or plans.split(layout, dtype, limits)
            if plan not in times:
                token = _tried.set(limits)
                try:
                    times[plan] = _milliseconds(call), variant
                finally:
                    _tried.reset(token)
    except torch.OutOfMemoryError:
        return {}
    by_rule, *others = times.values()
    best = min(others, key=lambda timed: timed[0], default=by_rule)
    return best[1] if best[0] < by_rule[0] * (1 - _MIN_GAIN) else {}


def _example(device: torch.device, layout: Layout, dtype: torch.dtype, direction: str) -> Any:
    """Return a call on random elements of a layout, whose generator is not the user's."""
    from fastbn.backends.triton import ops  # imports this module

    generator = torch.Generator(device).manual_seed(0)
    if layout.inner > 1:
        shape = layout.outer, layout.channels, layout.inner
    else:
        shape = (layout.outer, layout.channels)
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    weight = torch.ones(layout.channels, dtype=dtype, device=device)
    if direction == "forward":
        return lambda: ops.batch_norm_train(x, None, weight, weight, None, None, None, 0.1, 1e-5, 0, False)
    mean, inv_std = (torch.full((layout.channels,), value, dtype=torch.float64, device=device) for value in (0, 1))
    needs = True, True, True, False
    return lambda: ops.batch_norm_backward(x, x, None, None, weight, weight, mean, inv_std, True, 0, *needs)


def _milliseconds(call: Any) -> float:
    """Return the median time of a call, with L2 flushed before each."""
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median")


@functools.cache
def _file() -> Path:
    """Return where variants are kept: for another Triton or another fastbn they are measured again."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastbn")
    return folder / f"triton-{importlib.metadata.version('triton')}-{__version__}.json"


@functools.cache
def _variants() -> dict[str, dict[str, int]]:
    """Return the variants that are known, by key: those of the file, and those that this process measures."""
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):  # there is none yet, or somebody has edited it
        return {}


def _save(variants: dict[str, dict[str, int]]) -> None:
    """Replace the file as a whole, so that no reader finds a half of it. Where that fails, this process knows alone."""
    with contextlib.suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False) as file:
            json.dump(variants, file, indent=1)
        os.replace(file.name, _file())
