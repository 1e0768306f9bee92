"""CUDA plans: the page of those for ResNet-50, and the launches of a plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbn
from fastbn import _C
from fastbn.testing import tolerance
from tests.emulator import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def max_sms():
    yield fastbn.set_max_sms
    fastbn.set_max_sms(None)


@pytest.mark.parametrize("count", [0, -3])
def test_a_cap_of_no_sms_is_refused(max_sms, count):
    with pytest.raises(ValueError, match=f"count: expected at least 1, or None, got {count}"):
        max_sms(count)


def test_the_page_of_plans_is_what_the_planner_says():
    written = subprocess.run([sys.executable, ROOT / "docs" / "plans.py"], capture_output=True, text=True, check=True)
    assert written.stdout == (ROOT / "docs" / "plans.md").read_text(), "python docs/plans.py > docs/plans.md"


@pytest.mark.parametrize("ops, launches", [("emulator", 3)], indirect=["ops"])
@pytest.mark.parametrize("shape", [(40, 3, 50), (600, 24)], ids=str)
def test_launches_are_those_of_the_schedule(ops, launches, shape):
    """The average is cumulative: every block of a launch needs the number of batches before it."""
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
        begun = launched()  # with frozen statistics the input's gradient does not wait for those of weight and bias
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


def test_an_unknown_direction_is_refused():
    limits = _C.named_device("h200")
    options = dict(dtype=0, activation=0, residual=False, aligned=True, limits=limits)
    with pytest.raises(ValueError, match="direction: expected one of forward, eval, .*, got 'sideways'"):
        _C.plan(sizes=[2, 3], strides=[3, 1], direction="sideways", **options)
