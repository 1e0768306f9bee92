"""Training leaves the versions of running statistics alone, as torch's BatchNorm does, in every layer that moves them.

Autograd saves them in evaluation, and a backward after a step in training must find what it saved.
"""

from __future__ import annotations

import pytest
import torch

import fastbn
from fastbn import functional

LAYERS = {
    "BatchNorm": lambda: fastbn.BatchNorm1d(3),
    "BatchRenorm": lambda: fastbn.BatchRenorm1d(3),
    "GhostBatchNorm": lambda: fastbn.GhostBatchNorm1d(3, virtual_batch_size=2),
    "MaskedBatchNorm": lambda: fastbn.MaskedBatchNorm1d(3),
    "WhiteningBatchNorm": lambda: fastbn.WhiteningBatchNorm1d(3),
    "AccumulatedBatchNorm": lambda: fastbn.AccumulatedBatchNorm1d(3),
}


def _train(layer, x):
    arguments = (torch.arange(8) % 3 > 0,) if isinstance(layer, fastbn.MaskedBatchNorm1d) else ()
    layer.train()(x, *arguments)
    if isinstance(layer, fastbn.AccumulatedBatchNorm1d):
        layer.finish()


@pytest.mark.parametrize("name", LAYERS)
def test_training_bumps_no_version(name):
    layer = LAYERS[name]()
    buffers = [buffer for key, buffer in layer.named_buffers() if key.startswith("running")]
    versions, values = [buffer._version for buffer in buffers], [buffer.clone() for buffer in buffers]
    _train(layer, torch.randn(8, 3) + 1)
    assert not any(map(torch.equal, buffers, values))
    assert [buffer._version for buffer in buffers] == versions


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_of_an_evaluation_before_training(name, monkeypatch):
    """By torch's operations, which save the buffers."""
    monkeypatch.setattr(functional, "NODE", None)
    layer, x = LAYERS[name](), torch.randn(8, 3, requires_grad=True)
    output = layer.eval()(x)
    _train(layer, x.detach())
    output.sum().backward()
    assert x.grad.isfinite().all()
