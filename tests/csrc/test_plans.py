"""CUDA plans: predicted traffic for the activations of ResNet-50, and the launches of a plan."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbn
from bench.workloads import RESNET50
from fastbn import _C
from fastbn.backends import reference
from fastbn.ops import contract
from fastbn.testing import tolerance
from tests.emulator import build
from tests.implementations import EMULATED_LIMITS

ROOT = Path(__file__).resolve().parents[2]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
BATCHES = (32, 64, 128, 256)


def _plan(batch, channels, size, memory_format, direction):
    x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="meta", memory_format=memory_format)
    return fastbn.explain(x, direction, device="h200")


CASES = {(batch, *activation) for batch in BATCHES for activation in RESNET50}


@pytest.mark.parametrize("direction, reads", [("forward", 1), ("backward", 2)])
def test_contiguous_activations_are_read_once(direction, reads):
    """Except where two phases are faster: some large tensors whose runs do not fill vectors, and one other."""
    plans = {case: _plan(*case, CONTIGUOUS, direction) for case in CASES}
    in_phases = {case for case, plan in plans.items() if plan.launches > 1}
    assert all(plan.tensor_reads == reads for case, plan in plans.items() if case not in in_phases)
    assert {case for case in in_phases if case[2] >= 28} <= {(256, 256, 56)}
    assert all(batch * channels * size**2 * 2 > 25e6 for batch, channels, size in in_phases)


@pytest.mark.parametrize("direction, reads", [("forward", 1), ("backward", 2)])
def test_channels_last_activations_that_fit_on_chip_are_read_once(direction, reads):
    """There are 26 MB of shared memory. Larger tensors go tile by tile, or in two phases, or keep a part on chip."""
    for batch, channels, size in CASES:
        plan = _plan(batch, channels, size, CHANNELS_LAST, direction)
        if batch * channels * size**2 * 2 * reads < 26e6:
            assert plan.launches == 1 and plan.tensor_reads == reads, (batch, channels, size)
        assert plan.launches == 1 or plan.tensor_reads == 2 * reads


def test_only_backward_of_channels_last_keeps_a_part():
    """It does so only without a residual, as measurements on an H200 say."""
    keeps_a_part = lambda plan: "of a channel tile on chip" in plan.reason  # noqa: E731
    assert not any(keeps_a_part(_plan(*case, CHANNELS_LAST, "forward")) for case in CASES)
    assert not any(keeps_a_part(_plan(*case, CONTIGUOUS, "backward")) for case in CASES)
    backward = {case: _plan(*case, CHANNELS_LAST, "backward") for case in CASES}
    partial = [case for case, plan in backward.items() if keeps_a_part(plan)]
    assert (128, 64, 112) in partial and (64, 64, 56) in partial
    assert all(backward[case].launches == 1 and backward[case].tensor_reads > 2 for case in partial if case[1] > 64)
    x = torch.empty(128, 64, 112, 112, dtype=torch.bfloat16, device="meta", memory_format=CHANNELS_LAST)
    assert not keeps_a_part(fastbn.explain(x, "backward", activation="relu", residual=True, device="h200"))


def test_the_planner_chooses_what_was_fast_on_an_h200():
    """Its plans are within 4 % of the fastest, as a geometric mean over all measured cases, and none is far off."""
    path = ROOT / "bench" / "results" / "h200-plans.csv"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    measured: dict[tuple, dict[tuple, float]] = {}
    for row in csv.DictReader(lines):
        assert row["wrong"] == "0", row
        case = tuple(row[name] for name in ("outer", "channels", "inner", "dtype", "direction", "epilogue"))
        schedule = "" if row["schedule"] == "two_phase" else row["schedule"] + "_"
        blocks = int(row["groups"]) * int(row["splits"])
        numbers = (int(row["cluster"]), blocks, int(row["channels_per_tile"]))
        plan = (schedule + row["kernel"], *numbers, row["resident_fraction"])
        measured.setdefault(case, {})[plan] = float(row["us"])
    ratios = []
    for case, plans in measured.items():
        outer, channels, inner = map(int, case[:3])
        sizes, strides = [outer, channels], [channels * inner, inner]
        if inner > 1:
            sizes, strides = [*sizes, inner], [*strides, 1]
        chosen = fastbn._C.plan(
            sizes=sizes,
            strides=strides,
            dtype=contract.DTYPES.index(getattr(torch, case[3])),
            direction=case[4],
            activation=int(case[5] != "none"),
            residual=case[5] == "add_relu",
            aligned=True,
            limits=fastbn._C.named_device("h200"),
        )
        names = ("kernel", "cluster", "blocks", "channels_per_tile")
        plan = (*(chosen[name] for name in names), f"{chosen['resident_fraction']:.3f}")
        if channels == 1 and inner == 1:  # which layout_of takes as one run
            continue
        assert plan in plans, (case, plan)
        ratios.append(plans[plan] / min(plans.values()))
    assert len(ratios) > 450
    assert statistics.geometric_mean(ratios) < 1.04
    assert max(ratios) < 1.6


@pytest.fixture
def max_sms():
    yield fastbn.set_max_sms
    fastbn.set_max_sms(None)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_cooperative_plans_leave_sms(max_sms, memory_format, direction):
    """A grid has at most one block per SM then: a smaller grid occupies as many SMs as it has blocks."""
    everything = _plan(64, 64, 112, memory_format, direction)
    max_sms(100)
    cooperative = [_plan(b, c, s, memory_format, direction) for b in BATCHES for c, s in RESNET50]
    cooperative = [plan for plan in cooperative if plan.kernel.startswith("cooperative")]
    assert all(plan.blocks <= 100 for plan in cooperative)
    # With one block on each, clusters are the better way to keep a contiguous channel.
    assert cooperative or memory_format is CONTIGUOUS
    max_sms(None)
    assert _plan(64, 64, 112, memory_format, direction) == everything


@pytest.mark.parametrize("count", [0, -3])
def test_a_cap_of_no_sms_is_refused(max_sms, count):
    with pytest.raises(ValueError, match=f"count: expected at least 1, or None, got {count}"):
        max_sms(count)


def test_the_page_of_plans_is_what_the_planner_says():
    written = subprocess.run([sys.executable, ROOT / "docs" / "plans.py"], capture_output=True, text=True, check=True)
    assert written.stdout == (ROOT / "docs" / "plans.md").read_text(), "python docs/plans.py > docs/plans.md"


@pytest.mark.parametrize("ops", ["cooperative"], indirect=True)
def test_a_cooperative_launch_that_is_refused_is_planned_again(ops):
    """The grid has more blocks than run at once, as where another process uses the GPU too."""
    emulator, x = build.load(), torch.randn(40, 3, 50, generator=torch.Generator().manual_seed(0))
    counter = torch.tensor(0)
    given = (x, None, None, None, None, None, counter, 0.1, 1e-5, 0, False)
    granted = ops.namespace.batch_norm_train(*given)
    emulator.set_limits(**{**EMULATED_LIMITS["cooperative"], "blocks_per_group": 1 << 16})
    begun = emulator.launches()
    output, mean, inv_std, _ = ops.namespace.batch_norm_train(*given)
    assert counter.item() == 2 and emulator.launches() - begun == 1  # of a resident plan
    torch.testing.assert_close(output, granted[0])
    torch.testing.assert_close(mean, granted[1])
    grads = ops.namespace.batch_norm_backward(x, x, None, None, None, None, mean, inv_std, True, 0, True, *[False] * 3)
    exact = reference.batch_norm_backward(x, x, None, None, None, None, mean, inv_std, True, 0, True, *[False] * 3)
    torch.testing.assert_close(grads[0], exact[0])


@pytest.mark.parametrize("ops, launches", [("emulator", 3), ("resident", 1), ("cooperative", 1)], indirect=["ops"])
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
