"""CUDA plans: predicted traffic for the activations of ResNet-50, and the launches that a plan comes to."""

from __future__ import annotations

import pytest
import torch

import fastbn
from bench.workloads import RESNET50
from tests import tolerance
from tests.emulator import build

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
BATCHES = (32, 64, 128, 256)


def _plan(batch, channels, size, memory_format, direction):
    x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="meta", memory_format=memory_format)
    return fastbn.explain(x, direction, device="h200")


def _read_again(memory_format, direction):
    """(batch, channels, size) of the activations that do not fit on chip, and are read twice."""
    cases = [(batch, *activation) for batch in BATCHES for activation in RESNET50]
    return {case for case in cases if _plan(*case, memory_format, direction).launches > 1}


def test_contiguous_activations_but_the_largest_are_read_once():
    assert _read_again(CONTIGUOUS, "forward") == {(256, 64, 112)}
    assert _read_again(CONTIGUOUS, "backward") == {(128, 64, 112), (256, 64, 112)}


def test_channels_last_activations_are_read_once_as_far_as_a_cluster_holds_a_slice():
    # 16 blocks hold 3 MB: 32 bytes of some 90 thousand rows, in backward of half as many.
    rows = {direction: 0 for direction in ("forward", "backward")}
    for direction in rows:
        again = _read_again(CHANNELS_LAST, direction)
        kept = {(b, c, s) for b in BATCHES for c, s in RESNET50} - again
        rows[direction] = max(b * s * s for b, c, s in kept)
        assert min(b * s * s for b, c, s in again) > rows[direction]
    assert rows == {"forward": 50176, "backward": 25088}


@pytest.mark.parametrize(
    "ops, launches", [pytest.param("emulator", 3, id="two_phase"), pytest.param("resident", 1)], indirect=["ops"]
)
@pytest.mark.parametrize("shape", [(40, 3, 50), (600, 24)], ids=str)
def test_launches_are_those_of_the_schedule(ops, launches, shape):
    """With a cumulative average, for which every block of a launch needs the number of batches before it."""
    launched = build.load().launches
    channels = shape[1]
    x = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weight = torch.linspace(0.5, 1.5, channels)
    buffers = torch.zeros(channels), torch.ones(channels), torch.tensor(0)
    begun = launched()
    for batch in x:
        given = (batch, None, weight, None, *buffers, None, 1e-5, 0, False)
        output, mean, inv_std, _ = ops.namespace.batch_norm_train(*given)
    assert launched() - begun == 3 * launches
    begun = launched()
    needs = (True, True, False, False)
    ops.namespace.batch_norm_backward(output, x[-1], None, None, weight, None, mean, inv_std, True, 0, *needs)
    assert launched() - begun == launches

    # Each batch is off by its own tolerance at most, and each average rounds once.
    count, dims = x[0].numel() // channels, [0, *range(2, len(shape))]
    var, mean = (torch.stack(each).mean(0) for each in zip(*(torch.var_mean(b.double(), dims) for b in x)))
    deviation = torch.stack(x).double().abs().amax() + mean.abs()
    for what, got, exact, allowed in (
        ("running_mean", buffers[0], mean, tolerance.mean_tolerance(torch.float32, count, deviation, mean)),
        ("running_var", buffers[1], var, tolerance.variance_tolerance(torch.float32, count, var, mean)),
    ):
        rounded = allowed + len(x) * tolerance.ulp(torch.float32, deviation)
        tolerance.assert_close_to_reference(got, exact, rounded, what)
    assert buffers[2].item() == 3
