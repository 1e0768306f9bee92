"""CUDA plans: predicted traffic for the activations of ResNet-50, and the launches that a plan comes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbn
from bench.workloads import RESNET50
from tests import tolerance
from tests.emulator import build
from tests.implementations import EMULATED_LIMITS

ROOT = Path(__file__).resolve().parents[1]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
BATCHES = (32, 64, 128, 256)


def _plan(batch, channels, size, memory_format, direction):
    x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="meta", memory_format=memory_format)
    return fastbn.explain(x, direction, device="h200")


CASES = {(batch, *activation) for batch in BATCHES for activation in RESNET50}


@pytest.mark.parametrize("direction, reads", [("forward", 1), ("backward", 2)])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_activations_are_read_once(memory_format, direction, reads):
    """But where 32 bytes of all rows, the narrowest slice, are more than the chip and half of L2 hold."""
    plans = {case: _plan(*case, memory_format, direction) for case in CASES}
    assert all(plan.launches == 1 and plan.tensor_writes == 1 for plan in plans.values())
    too_large = set() if memory_format is CONTIGUOUS else {(256, 64, 112)}
    if too_large and direction == "backward":  # which keeps two tensors
        too_large.add((128, 64, 112))
    assert {case for case, plan in plans.items() if plan.tensor_reads > reads} == too_large


@pytest.mark.parametrize("direction, octets", [("forward", 1), ("backward", 2)])
def test_a_part_is_kept_of_slices_that_are_larger_than_the_chip(direction, octets):
    """The narrowest slice of 802816 rows is 26 MB: that is what 132 multiprocessors just hold."""
    for case in CASES:
        batch, _, size = case
        keeps_a_part = "of a slice on chip" in _plan(*case, CHANNELS_LAST, direction).reason
        assert keeps_a_part == (batch * size * size * octets > 802816), case


@pytest.fixture
def max_sms():
    yield fastbn.set_max_sms
    fastbn.set_max_sms(None)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_cooperative_plans_leave_multiprocessors(max_sms, memory_format, direction):
    """One block on each at most: a smaller grid lies on as many multiprocessors as it has blocks."""
    everything = _plan(64, 64, 112, memory_format, direction)
    max_sms(100)
    cooperative = [_plan(b, c, s, memory_format, direction) for b in BATCHES for c, s in RESNET50]
    cooperative = [plan for plan in cooperative if plan.kernel.startswith("cooperative")]
    assert cooperative and all(plan.blocks <= 100 for plan in cooperative)
    max_sms(None)
    assert _plan(64, 64, 112, memory_format, direction) == everything


@pytest.mark.parametrize("count", [0, -3])
def test_no_multiprocessors_are_too_few(max_sms, count):
    with pytest.raises(ValueError, match=f"count: expected at least 1, or None, got {count}"):
        max_sms(count)


def test_the_page_of_plans_is_what_the_planner_says():
    written = subprocess.run([sys.executable, ROOT / "docs" / "plans.py"], capture_output=True, text=True, check=True)
    assert written.stdout == (ROOT / "docs" / "plans.md").read_text(), "python docs/plans.py > docs/plans.md"


@pytest.mark.parametrize("ops", ["cooperative"], indirect=True)
def test_a_cooperative_launch_that_is_refused_is_planned_again(ops):
    """More blocks than run at once, as where another process has a share of the GPU."""
    emulator, x = build.load(), torch.randn(40, 3, 50, generator=torch.Generator().manual_seed(0))
    counter = torch.tensor(0)
    given = (x, None, None, None, None, None, counter, 0.1, 1e-5, 0, False)
    granted = ops.namespace.batch_norm_train(*given)
    emulator.set_limits(**{**EMULATED_LIMITS["cooperative"], "blocks_a_group": 1 << 16})
    begun = emulator.launches()
    output, mean, inv_std, _ = ops.namespace.batch_norm_train(*given)
    assert counter.item() == 2 and emulator.launches() - begun == 1  # of a resident plan
    torch.testing.assert_close(output, granted[0])
    torch.testing.assert_close(mean, granted[1])
    grads = ops.namespace.batch_norm_backward(x, x, None, None, None, None, mean, inv_std, True, 0, True, *[False] * 3)
    exact = fastbn.reference.batch_norm_backward(
        x, x, None, None, None, None, mean, inv_std, True, 0, True, *[False] * 3
    )
    torch.testing.assert_close(grads[0], exact[0])


@pytest.mark.parametrize("ops, launches", [("emulator", 3), ("resident", 1), ("cooperative", 1)], indirect=["ops"])
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
    for needs, frozen_launches in (((True, True, True, False), 2), ((True, False, False, False), 1)):
        begun = launched()  # frozen statistics: the input's gradient does not wait for those of weight and bias
        ops.namespace.batch_norm_backward(output, x[-1], None, None, weight, None, mean, inv_std, False, 1, *needs)
        assert launched() - begun == frozen_launches

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
