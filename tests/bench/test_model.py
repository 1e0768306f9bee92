"""The timing model of the CUDA kernels reproduces what was measured, and predicts what was not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from bench.model import constants, fit, formula, measurements, predict, search, stream, table
from bench.model.constants import Constants
from bench.model.measurements import Case

ROOT = Path(__file__).resolve().parents[2]
MAX_ERROR = 0.12


@pytest.mark.parametrize(
    "inner, direction, epilogue, reads, writes",
    [
        (1, "forward", "relu", 1, 1),
        (1, "forward", "add_relu", 2, 1 + 1 / 16),
        (1, "backward", "none", 2, 1),
        (1, "backward", "add_relu", 2 + 1 / 16, 2),
        (196, "forward", "add_relu", 2, 1),
        (196, "backward", "add_relu", 3, 2),
    ],
)
def test_tensors_that_a_call_moves(inner, direction, epilogue, reads, writes):
    """196 elements do not fill bytes of a mask: backward reads the residual instead."""
    case = Case(32, 64, inner, "bfloat16", direction, epilogue)
    assert (case.reads, case.writes) == (reads, writes)


@pytest.fixture(scope="module")
def measured():
    return measurements.read(ROOT / "bench" / "results" / "h200-plans.csv")


@pytest.fixture(scope="module")
def loops():
    return table.read(ROOT / "bench" / "model" / "measured_loops.json")


@pytest.fixture(scope="module")
def fitted(measured, loops):
    return fit.fit(measured, loops)


def test_the_model_reproduces_the_measurements(measured, loops):
    errors = fit.errors(measured, loops, constants.read())
    assert errors["all"].plans == len(measured) == 4600
    assert errors["all"].mean < MAX_ERROR, errors
    families = {"resident": 0.12, "cluster": 0.12, "cooperative": 0.10, "kept": 0.15, "two_phase": 0.07}
    assert errors.keys() == {*families, "all"}
    for family, limit in families.items():
        assert errors[family].mean < limit, f"{family}: {errors[family]}"


def test_a_fit_finds_the_committed_constants(fitted):
    committed = dataclasses.asdict(constants.read())
    assert dataclasses.asdict(fitted) == pytest.approx(committed, rel=0.01)


def test_half_of_the_cases_tell_the_other_half(measured, loops):
    cases = sorted({m.case for m in measured}, key=str)
    known = set(cases[::2])
    errors = fit.errors(
        [m for m in measured if m.case not in known],
        loops,
        fit.fit([m for m in measured if m.case in known], loops),
    )
    assert errors["all"].mean < MAX_ERROR


def test_slower_measurements_change_the_constants(measured, loops, fitted):
    slower = fit.fit([dataclasses.replace(m, us=1.5 * m.us) for m in measured], loops)
    assert fit.errors(measured, loops, slower)["all"].mean > 0.35
    for name in ("launch_us", "two_phase_us", "channel_block_us", "row_block_us"):
        assert getattr(slower, name) / getattr(fitted, name) == pytest.approx(1.5, rel=0.15), name
    rate = slower.two_phase_bytes_per_ns_sm / fitted.two_phase_bytes_per_ns_sm
    assert rate == pytest.approx(1 / 1.5, rel=0.05)


# --- Stream plans

CASE = Case(128, 512, 784, "bfloat16", "forward")
CYCLES = stream.Cycles(44.0, 52.0, 0.0)


def plan(**changes: object) -> dict[str, object]:
    parts = {"kernel": "stream_channel_tiles", "tiles": 512, "groups": 33, "splits": 4, "ahead": 1, "chunks": 13}
    parts |= {"chunk_bytes": 16384, "chunks_per_tile": 4, "tensors": 1, "channels_per_tile": 1}
    return parts | {"tensor_reads": 1, "tensor_writes": 1} | changes


def test_one_tile_takes_the_sum_of_its_steps():
    case, c = Case(2, 132, 8192, "bfloat16", "forward"), Constants()
    one = plan(tiles=132, groups=132, splits=1, ahead=0, chunks=1, chunks_per_tile=1, chunk_bytes=32768)
    kb, cycles_per_us = 2 * 8192 * 2 / 1e3, c.clock_ghz * 1e3
    vectors = kb / 0.512 / 4  # of a scheduler
    steps = c.stream_launch_us + 2 * kb / c.stream_bytes_per_ns_sm + c.stream_latency_us + c.lone_finish_us
    steps += vectors * (CYCLES.sums + CYCLES.write) / cycles_per_us
    assert stream.predict(case, one, CYCLES, c).us == pytest.approx(steps)


def test_tiles_ahead_hide_the_exchange():
    times = [stream.predict(CASE, plan(ahead=ahead), CYCLES, Constants()).us for ahead in (0, 1, 2)]
    assert times[0] > 1.3 * times[1]
    floor = 2 * CASE.tensor_bytes / 1e3 / 132 / Constants().stream_bytes_per_ns_sm
    assert floor < times[1] < 1.15 * floor + 6
    # The ring has no room to load the next tile while three are in it.
    assert times[2] > 1.15 * times[1]


def test_a_slower_producer_bounds_the_loads():
    fast, slow = (
        stream.predict(CASE, plan(), dataclasses.replace(CYCLES, copies=copies), Constants()).us for copies in (30, 150)
    )
    two = stream.predict(CASE, plan(producers=2), dataclasses.replace(CYCLES, copies=150), Constants()).us
    kilobytes = CASE.tensor_bytes / 132 / 1e3
    assert slow > kilobytes / 0.512 * 150 / Constants().clock_ghz / 1e3 > fast
    assert two < 0.75 * slow


def test_two_finishers_take_turns():
    """However small the tiles are, two of them take as long as a finisher takes for one."""
    many = plan(tiles=128 * 132, groups=132, splits=1, ahead=3, chunks_per_tile=1, chunk_bytes=4096)
    c = Constants()
    times = [stream.predict(CASE, many, CYCLES, dataclasses.replace(c, lone_finish_us=us)).us for us in (4.0, 8.0)]
    assert times[0] > 128 / 2 * 4 and times[1] - times[0] == pytest.approx(128 / 2 * 4, rel=0.1)


def test_a_ring_without_room_for_the_tiles_ahead_is_refused():
    with pytest.raises(ValueError, match="expected a ring of 12 chunks at least, got 11"):
        stream.predict(CASE, plan(ahead=2, chunks=11), CYCLES, Constants())


def test_a_fit_finds_the_constants_of_stream_plans(loops):
    """Of times that the model itself made up with other constants."""
    told = dataclasses.replace(Constants(), finish_us=4.5, lone_finish_us=2.2, stream_bytes_per_ns_sm=27.0)
    made_up = []
    kernels = ("sums", "write")
    records = [
        table.LoopRecord(
            "stream_forward", "bfloat16", f"(Kernel){k}", loop, 4, 45, dict.fromkeys(table.WARPS, 50), {}, 96
        )
        for k in (0, 1)
        for loop in kernels
    ]
    for outer, channels, inner in ((128, 256, 784), (128, 512, 196), (32, 512, 784), (25088, 512, 1)):
        case = Case(outer, channels, inner, "bfloat16", "forward")
        for chosen in list(search.plans_of(case))[:12]:
            cycles = stream.cycles_of(case, "row" in chosen["kernel"], records)
            columns = {key: str(value) for key, value in chosen.items()} | {"schedule": "stream"}
            us = stream.predict(case, chosen, cycles, told).us
            made_up.append(measurements.Measurement(case, columns, us, 1.0))
    found = fit.fit(made_up, records)
    assert fit.errors(made_up, records, found)["stream"].mean < 0.01
    assert found.stream_bytes_per_ns_sm == pytest.approx(27.0, rel=0.03)
    assert found.finish_us == pytest.approx(4.5, rel=0.1)
    assert found.dependent_launch_us == 0 and Constants().dependent_launch_us > 0


def test_the_formula_is_close_to_the_simulation():
    """And a planner that chooses by it loses little."""
    ratios, losses = [], []
    for outer, channels, inner, direction in (
        (128, 512, 784, "forward"),
        (32, 64, 12544, "backward"),
        (128, 512, 196, "backward"),
        (25088, 512, 1, "forward"),
        (100352, 256, 1, "backward"),
    ):
        case = Case(outer, channels, inner, "bfloat16", direction)
        plans = list(search.plans_of(case))
        simulated = [stream.predict(case, p, CYCLES, Constants()).us for p in plans]
        by_formula = [formula.predicted_us(case, p, CYCLES, Constants()) for p in plans]
        ratios += [a / b for a, b in zip(by_formula, simulated, strict=True)]
        losses.append(simulated[by_formula.index(min(by_formula))] / min(simulated))
    assert len(ratios) > 100 and measurements.geometric_error(ratios) < 0.05
    assert measurements.geometric_error(losses) < 0.05


# --- Predictions


def test_every_group_with_a_target_has_a_prediction(measured, loops):
    records = [
        table.LoopRecord(f"stream_{d}", dtype, f"(Kernel){k}", loop, 4, 45, dict.fromkeys(table.WARPS, cycles), {}, 96)
        for d, dtype, cycles in (
            ("forward", "bfloat16", 50),
            ("backward", "bfloat16", 75),
            ("forward", "float32", 100),
            ("backward", "float32", 150),
        )
        for k in (0, 1)
        for loop in ("sums", "write")
    ]

    def plan_of(case: Case) -> dict[str, object]:
        return search.best_plan(case, records, [Constants()])

    for group in predict.GROUPS:
        for direction in predict.DIRECTIONS:
            found = predict.predictions(group, direction, measured, plan_of, records, Constants())
            assert len(found) >= 3, group.name
            for p in found:
                assert 0 < p.pessimistic.memory_busy <= p.base.memory_busy <= 1
                assert 0.3 < p.share(p.pessimistic.us) <= p.share(p.base.us) < 1.05
                assert int(p.plan["splits"]) * int(p.plan["groups"]) <= 132
    text = predict.report(measured, plan_of, records, Constants())
    assert text.count("forward") == text.count("backward") == len(predict.GROUPS)
    assert "no GPU ran them" in text


def test_cycles_between_counts_of_warps():
    record = table.LoopRecord("k", "float32", "", "sums", 1, 10, {1: 40.0, 2: 20.0, 4: 10.0, 8: 10.0}, {}, 32)
    assert record.cycles_at(2) == 20.0
    assert record.cycles_at(3) == pytest.approx(1 / (0.5 / 20 + 0.5 / 10))
    assert record.cycles_at(0.5) == 40.0 and math.isclose(record.cycles_at(16), 10.0)
