"""The implementations of the contract that tests run, how to load each, and the treatment of a missing GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastbn.testing.cases import SMALL_NUMEL, Case
from tests import tiers

# The emulated implementations, each with the limits of its GPU: few SMs, so that plans split the small shapes of tests,
# and for "emulator" no shared memory for a ring, so that it runs in two phases what "stream" reads once.
NAMES = ("reference", "cpu", "emulator", "stream", "cuda", "triton", "triton_split")
EMULATED_LIMITS = {
    "emulator": {"sm_count": 2, "shared_bytes_per_block": 0, "stream_splits": 0},
    "stream": {"sm_count": 4, "shared_bytes_per_block": 232448, "stream_splits": 2},
}
# Triton's kernels, with limits of the plans: "triton_split" reads twice, in parts, what "triton" reads once, and counts
# in 64 bits. Without a GPU Triton interprets them.
TRITON_LIMITS: dict[str, dict[str, int]] = {
    "triton": {},
    "triton_split": {"sm_count": 1, "resident_elements": 0, "block_elements": 256, "max_int32": 0},
}


@dataclass(frozen=True)
class Implementation:
    """An implementation. `namespace` has the eight ops as attributes, which take tensors on `device`."""

    name: str
    namespace: Any
    device: torch.device

    def __str__(self) -> str:
        return self.name


def params(*names: str) -> list:
    """Return values to parametrise the fixture `ops` with (indirect)."""
    return [pytest.param(name, id=name, marks=marks(name)) for name in names or NAMES]


def pairs(table: Iterable[Case], *names: str) -> list:
    """Return pairs of implementation and case for "ops, case", for tests of accuracy.

    A slow one takes only the small cases.
    """
    return [
        pytest.param(name, case, id=f"{name}-{case}", marks=[*marks(name), *tiers.marks(case)])
        for name in names
        for case in table
        if case.numel <= SMALL_NUMEL or not is_slow(name)
    ]


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of an implementation.

    Interpreting takes half an hour, so it is done where it is asked for (nox -s interpreted). The fast tier has
    tests/backends/triton and some setups of the table (conftest.py).
    """
    if name == "cuda" or (name in TRITON_LIMITS and torch.cuda.is_available()):
        return [pytest.mark.gpu]
    return [pytest.mark.interpreted] if name in TRITON_LIMITS else []


def load(name: str) -> Implementation:
    """Load an implementation. Failing to load raises: a broken build must not pass for a skipped test."""
    if name == "reference":
        return Implementation(name, importlib.import_module("fastbn.backends.reference"), torch.device("cpu"))
    if name in EMULATED_LIMITS:
        importlib.import_module("tests.emulator.build").load()
        return Implementation(name, torch.ops.fastbn_emulator, torch.device("cpu"))
    importlib.import_module("fastbn")
    if name in TRITON_LIMITS:
        return _load_triton(name)
    return Implementation(name, torch.ops.fastbn, torch.device(name))


def _load_triton(name: str) -> Implementation:
    is_interpreted = not torch.cuda.is_available()
    if is_interpreted:
        importlib.import_module("tests.interpreter").repair()
    return Implementation(name, torch.ops.fastbn_triton, torch.device("cpu" if is_interpreted else "cuda"))


def set_triton_limits(name: str) -> None:
    """Let the Triton kernels plan with the limits of an implementation from now on."""
    ops = importlib.import_module("fastbn.backends.triton.ops")
    limits = importlib.import_module("fastbn.backends.triton.plans").Limits(**TRITON_LIMITS[name])
    ops.limits_of = lambda *call: limits


def backend_name(name: str) -> str:
    """Return fastbn's name of an implementation: some differ in the limits of their GPU only."""
    return "emulator" if name in EMULATED_LIMITS else "triton" if name in TRITON_LIMITS else name


def is_slow(name: str) -> bool:
    """Return whether an implementation takes milliseconds per block, so that tests give it few elements."""
    return name in EMULATED_LIMITS or (name in TRITON_LIMITS and not torch.cuda.is_available())


def require_gpu() -> None:
    """Skip without a GPU, or fail under FASTBN_REQUIRE_CUDA=1."""
    if torch.cuda.is_available():
        return
    if os.environ.get("FASTBN_REQUIRE_CUDA") == "1":
        pytest.fail("FASTBN_REQUIRE_CUDA=1, but torch sees no GPU", pytrace=False)
    pytest.skip("needs a GPU")
