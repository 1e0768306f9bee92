"""CUDA plans: which requests are read once and by how many SMs, the limits that every plan keeps, and its launches."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbn
from bench.workloads import RESNET50
from fastbn import _C
from fastbn.backends import reference
from fastbn.ops import contract
from fastbn.ops.activations import ACTIVATIONS
from fastbn.testing import tolerance
from tests.emulator import build
from tests.implementations import EMULATED_LIMITS

ROOT = Path(__file__).resolve().parents[2]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
DEVICES = ("a100", "h100", "h200", "b200")
H200_SMS = 132
BATCHES = (32, 64, 128, 256)
CASES = [(batch, channels, size, size) for batch in BATCHES for channels, size in RESNET50]


def _plan(
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    direction: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "none",
    residual: bool = False,
    aligned: bool = True,
    device: str = "h200",
) -> dict[str, Any]:
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    return _C.plan(
        sizes=list(shape),
        strides=list(x.stride()),
        dtype=contract.DTYPES.index(dtype),
        direction=direction,
        activation=list(ACTIVATIONS).index(activation),
        residual=residual,
        aligned=aligned,
        limits=_C.named_device(device),
    )


def _streams(plan: dict[str, Any]) -> bool:
    return plan["kernel"].startswith("stream")


@pytest.mark.parametrize("direction, reads", [("forward", 1), ("backward", 2)])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_activations_of_which_a_tile_fits_on_chip_are_read_once(memory_format, direction, reads):
    """A tile is one channel of a contiguous activation, and at least 64 bytes per row of a channels_last one.

    Memory idles while a tile that fills the chip is summed, so that two phases may be predicted to be faster.
    """
    on_chip = H200_SMS * 192 * 1024  # of the 227 KB of a block; numbers per channel and sums take the rest
    for shape in CASES:
        batch, _, size, _ = shape
        plan = _plan(shape, memory_format, direction)
        tile_bytes = batch * size**2 * reads * (2 if memory_format == CONTIGUOUS else 64)
        once = plan["launches"] == 1
        assert once == _streams(plan), shape
        if tile_bytes <= 0.95 * on_chip or tile_bytes > on_chip:
            assert once == (tile_bytes <= on_chip), shape
        assert plan["tensor_reads"] == (reads if once else 2 * reads), shape
        assert plan["launches"] in (1, 3), shape
    once = [shape for shape in CASES if _plan(shape, memory_format, direction)["launches"] == 1]
    assert len(once) == len(CASES) or memory_format == CHANNELS_LAST
    assert len(once) > len(CASES) / 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_stream_plans_keep_the_sms_busy(memory_format, direction):
    """At least 95 % of the SMs have a block, and the mean of tiles per SM is at least 95 % of the maximum."""
    idle = set()
    for shape in CASES:
        plan = _plan(shape, memory_format, direction)
        if not _streams(plan):
            continue
        blocks = plan["groups"] * plan["splits"]
        assert plan["blocks"] == blocks <= H200_SMS
        max_tiles = -(-plan["tiles"] // plan["groups"])  # of a group
        mean_tiles = plan["tiles"] * plan["splits"] / H200_SMS
        if blocks < 0.95 * H200_SMS or mean_tiles < 0.95 * max_tiles:
            idle.add(shape)
    assert not idle


def _many_shapes():
    """Yield shapes and formats of every kind of walk, among them prime sizes, few channels and one row."""
    for batch, channels in itertools.product((1, 3, 32, 129), (1, 3, 8, 24, 61, 64, 264, 2048)):
        for size in (1, 2, 4, 7, 14, 23, 56):
            yield (batch, channels, size, size), CONTIGUOUS
            yield (batch, channels, size, size), CHANNELS_LAST


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_ring_holds_all_tiles_that_are_summed_before_one_is_written(dtype, device):
    """Otherwise the producer waits for chunks that the consumers do not free before they get more."""
    limits = _C.named_device(device)
    epilogues = (("none", False), ("relu", True), ("silu", True))
    for (shape, memory_format), direction in itertools.product(_many_shapes(), ("forward", "backward")):
        for activation, residual in epilogues:
            options = dict(dtype=dtype, activation=activation, residual=residual, device=device)
            plan = _plan(shape, memory_format, direction, **options)
            if not _streams(plan):
                continue
            assert plan["ahead"] + 1 <= plan["ring_tiles"], (shape, plan)
            assert plan["ring_tiles"] * plan["part_bytes"] < plan["shared_bytes"] <= limits.shared_bytes_per_block
            assert 1 <= plan["blocks"] <= limits.sm_count and plan["threads"] <= 1024
            assert plan["ahead"] < -(-plan["tiles"] // plan["groups"]), (shape, plan)
            # The residual passes through the ring where the derivative needs it, as it does without a mask.
            assert plan["tensors"] == (1 if direction == "forward" else int(plan["tensor_reads"]))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_many_shapes_have_stream_plans_of_both_kernels(direction):
    plans = [_plan(*shape, direction, dtype=torch.float32) for shape in _many_shapes()]
    assert {plan["kernel"].removeprefix("stream_") for plan in plans if _streams(plan)} == {
        "channel_tiles", "row_tiles"
    }  # fmt: skip
    assert any(plan["ahead"] > 0 for plan in plans) and any(plan["splits"] > 1 for plan in plans if _streams(plan))
    assert any(_streams(plan) and plan["ahead"] == 0 for plan in plans)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_what_stream_kernels_do_not_take_runs_in_two_phases(memory_format, direction):
    shape, two_phase_launches = (64, 256, 28, 28), 3
    assert _streams(_plan(shape, memory_format, direction))
    ragged = (64, 255, 27, 27)  # neither runs nor rows nor images fill vectors of 16 bytes
    for given, options in (
        (shape, {"dtype": torch.float64}),
        (shape, {"aligned": False}),
        (ragged, {}),
        (ragged, {"dtype": torch.float32}),
    ):
        plan = _plan(given, memory_format, direction, **options)
        assert not _streams(plan) and plan["launches"] == two_phase_launches, (given, options)
    # A run of 4 bytes is shorter than a vector, which may meet two channels at most.
    assert not _streams(_plan((4096, 64, 1, 2), CONTIGUOUS, direction))
    without_sums = "eval" if direction == "forward" else "frozen_backward"
    plan = _plan(shape, memory_format, without_sums)
    assert not _streams(plan) and plan["launches"] == 1 and plan["tensor_reads"] == 1


def test_a_mask_of_runs_that_do_not_fill_bytes_runs_in_two_phases():
    """fastbn.functional asks for none then, but the op's caller may. The planner of _C.plan does as it does."""
    plan = _plan((64, 256, 7, 7), CONTIGUOUS, "backward", activation="relu", residual=True)
    assert _streams(plan) and plan["tensors"] == 3 and plan["tensor_reads"] == 3
    plan = _plan((64, 256, 8, 8), CONTIGUOUS, "backward", activation="relu", residual=True)
    assert _streams(plan) and plan["tensors"] == 2 and plan["tensor_reads"] == 2 + 1 / 16


@pytest.mark.parametrize("epilogue", [("relu", False), ("silu", False), ("relu", True), ("silu", True)], ids=str)
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_the_plan_of_a_forward_does_not_depend_on_its_epilogue(memory_format, epilogue):
    """So statistics have the same bits with and without it."""
    activation, residual = epilogue
    traffic = ("tensor_reads", "tensor_writes", "predicted_us")
    for shape in CASES:
        bare = _plan(shape, memory_format, "forward")
        plan = _plan(shape, memory_format, "forward", activation=activation, residual=residual)
        assert all(plan[name] == bare[name] for name in plan if name not in traffic), shape


@pytest.fixture
def max_sms():
    yield fastbn.set_max_sms
    fastbn.set_max_sms(None)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_stream_plans_leave_sms_to_others(max_sms, memory_format, direction):
    """A stream kernel has one block per SM: a smaller grid occupies as many SMs as it has blocks."""
    free = [_plan(shape, memory_format, direction) for shape in CASES]
    assert any(_streams(plan) and plan["blocks"] > 100 for plan in free)
    max_sms(100)
    capped = [_plan(shape, memory_format, direction) for shape in CASES]
    streams = [plan for plan in capped if _streams(plan)]
    assert streams and all(plan["blocks"] <= 100 for plan in streams)
    assert any(plan["blocks"] >= 95 for plan in streams)
    max_sms(None)
    assert [_plan(shape, memory_format, direction) for shape in CASES] == free


@pytest.mark.parametrize("count", [0, -3])
def test_a_cap_of_no_sms_is_refused(max_sms, count):
    with pytest.raises(ValueError, match=f"count: expected at least 1, or None, got {count}"):
        max_sms(count)


def test_the_page_of_plans_is_what_the_planner_says():
    written = subprocess.run([sys.executable, ROOT / "docs" / "plans.py"], capture_output=True, text=True, check=True)
    assert written.stdout == (ROOT / "docs" / "plans.md").read_text(), "python docs/plans.py > docs/plans.md"


@pytest.mark.parametrize("ops", ["stream"], indirect=True)
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_a_cooperative_launch_that_is_refused_is_planned_again(ops, momentum):
    """The grid has more blocks than run at once, as where another process uses the GPU too."""
    emulator, x = build.load(), torch.randn(60, 4, 200, generator=torch.Generator().manual_seed(0))
    counter = torch.tensor(0)
    buffers = torch.zeros(4), torch.ones(4)
    given = (x, None, None, None, *buffers, counter, momentum, 1e-5, 0, False)
    granted = ops.namespace.batch_norm_train(*given)
    emulator.set_limits(**{**EMULATED_LIMITS["stream"], "stream_splits": 200})
    begun = emulator.launches()
    output, mean, inv_std, _ = ops.namespace.batch_norm_train(*given)
    assert emulator.launches() - begun == 1  # of a stream plan without splits; one that is refused does not count
    assert counter.item() == 2
    torch.testing.assert_close(output, granted[0])
    torch.testing.assert_close(mean, granted[1])
    begun = emulator.launches()
    grads = ops.namespace.batch_norm_backward(x, x, None, None, None, None, mean, inv_std, True, 0, True, *[False] * 3)
    assert emulator.launches() - begun == 1
    exact = reference.batch_norm_backward(x, x, None, None, None, None, mean, inv_std, True, 0, True, *[False] * 3)
    torch.testing.assert_close(grads[0], exact[0])


@pytest.mark.parametrize("ops", ["stream"], indirect=True)
def test_a_grid_that_is_refused_without_splits_runs_in_two_phases(ops):
    """A cumulative average takes a grid whose blocks all read the counter before one of them increments it."""
    emulator, x = build.load(), torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(0))
    emulator.set_limits(sm_count=128, shared_bytes_per_block=232448, stream_splits=0)
    buffers = torch.zeros(128), torch.ones(128), torch.tensor(0)
    for momentum, launches in ((0.1, 1), (None, 3)):
        begun = emulator.launches()
        ops.namespace.batch_norm_train(x, None, None, None, *buffers, momentum, 1e-5, 0, False)
        assert emulator.launches() - begun == launches
    assert buffers[2].item() == 2


@pytest.mark.parametrize(
    "ops, launches, shape",
    [("emulator", 3, (40, 3, 50)), ("emulator", 3, (600, 24)), ("stream", 1, (40, 4, 50)), ("stream", 1, (600, 24))],
    indirect=["ops"],
    ids=str,
)
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
