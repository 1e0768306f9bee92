"""A fixture by which tests of layers run on every implementation."""

from __future__ import annotations

import pytest

from fastbn import functional
from fastbn.backends import registry
from tests import implementations

BACKENDS = ("reference", "cpu", "emulator", "triton", "torch")


@pytest.fixture(params=[pytest.param(name, marks=implementations.marks(name)) for name in BACKENDS])
def every_backend(request, monkeypatch):
    """Give all calls of layers to one backend, as a user's device would, and return its name."""
    if request.param in ("emulator", "triton"):
        implementations.load(request.param)
    chosen = registry.get(request.param)
    monkeypatch.setattr(functional, "NODE", None)  # which runs the compiled ops only
    monkeypatch.setattr(registry, "choose", lambda call, name=None, **_: (chosen, None))
    if chosen.ops is not None:
        monkeypatch.setattr(registry, "choose_ops", lambda call: chosen)
    return request.param
