"""The implementations of the contract that tests run, how to load each, and the treatment of a missing GPU."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

# The emulated implementations, each with the limits of its GPU: few SMs, so that plans split the small shapes of tests,
# and for "emulator" no shared memory for a ring, so that it runs in two phases what "stream" reads once.
NAMES = ("reference", "cpu", "emulator", "stream", "cuda")
EMULATED_LIMITS = {
    "emulator": {"sm_count": 2, "shared_bytes_per_block": 0, "stream_splits": 0},
    "stream": {"sm_count": 4, "shared_bytes_per_block": 232448, "stream_splits": 2},
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
    return [pytest.param(name, id=name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in names or NAMES]


def load(name: str) -> Implementation:
    """Load an implementation. Failing to load raises: a broken build must not pass for a skipped test."""
    if name == "reference":
        return Implementation(name, importlib.import_module("fastbn.backends.reference"), torch.device("cpu"))
    if name in EMULATED_LIMITS:
        importlib.import_module("tests.emulator.build").load()
        return Implementation(name, torch.ops.fastbn_emulator, torch.device("cpu"))
    importlib.import_module("fastbn")
    return Implementation(name, torch.ops.fastbn, torch.device(name))


def require_gpu() -> None:
    """Skip without a GPU, or fail under FASTBN_REQUIRE_CUDA=1."""
    if torch.cuda.is_available():
        return
    if os.environ.get("FASTBN_REQUIRE_CUDA") == "1":
        pytest.fail("FASTBN_REQUIRE_CUDA=1, but torch sees no GPU", pytrace=False)
    pytest.skip("needs a GPU")
