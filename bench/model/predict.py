"""What the model predicts for the groups of cases that have targets. None of it is a measurement of stream kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.model import stream, two_phase
from bench.model.constants import Constants
from bench.model.measurements import Case, Measurement
from bench.model.planner import is_stream
from bench.model.table import LoopRecord

# From the last sum of a tile to its coefficients, and the memory's rate: as expected, and as they may turn out.
BASE = {"finish_us": 3.0, "lone_finish_us": 1.5, "stream_bytes_per_ns_sm": 31.5}
PESSIMISTIC = {"finish_us": 5.0, "lone_finish_us": 3.5, "stream_bytes_per_ns_sm": 29.9}

MB = 1e6
FEW_CHANNELS = 16
SMALL_IMAGES = (196, 49)
IMAGES = (32, 128, 256)  # per batch, in the measurements


def _is_contiguous(case: Case) -> bool:
    return case.inner > 1 and case.inner not in SMALL_IMAGES and case.channels > FEW_CHANNELS


def _is_channels_last(case: Case, sizes: Iterable[int], batches: Iterable[int] = IMAGES) -> bool:
    return case.inner == 1 and any(case.outer == n * size for n in batches for size in sizes)


@dataclass(frozen=True)
class Group:
    """Cases that have a target together: a share of the copy's bandwidth, forward and backward."""

    name: str
    dtype: str
    has: Callable[[Case], bool]
    targets: tuple[float, float]
    pessimistic: tuple[float, float]


GROUPS = (
    Group(
        "contiguous > 80 MB",
        "bfloat16",
        lambda c: _is_contiguous(c) and c.tensor_bytes > 80 * MB,
        (0.90, 0.85),
        (0.86, 0.72),
    ),
    Group(
        "contiguous 20 to 80 MB",
        "bfloat16",
        lambda c: _is_contiguous(c) and 20 * MB <= c.tensor_bytes <= 80 * MB,
        (0.84, 0.83),
        (0.70, 0.68),
    ),
    Group(
        "14x14, 7x7 contiguous",
        "bfloat16",
        lambda c: c.inner in SMALL_IMAGES and 20 * MB <= c.tensor_bytes <= 80 * MB,
        (0.82, 0.82),
        (0.69, 0.69),
    ),
    Group(
        "channels_last 14x14, 7x7",
        "bfloat16",
        lambda c: _is_channels_last(c, SMALL_IMAGES) and 20 * MB <= c.tensor_bytes <= 50 * MB and c.channels >= 256,
        (0.80, 0.78),
        (0.68, 0.65),
    ),
    Group(
        "channels_last 28x28, N = 128",
        "bfloat16",
        lambda c: _is_channels_last(c, (784,), (128,)) and c.channels >= 128,
        (0.75, 0.61),
        (0.64, 0.53),
    ),
    Group(
        "float32 contiguous",
        "float32",
        lambda c: _is_contiguous(c) and c.tensor_bytes >= 20 * MB,
        (0.88, 0.88),
        (0.79, 0.77),
    ),
)
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Predicted:
    """A case with its plan: the best time that was measured so far, of other plans, and two predicted ones."""

    case: Case
    plan: dict[str, object]
    copy_us: float
    measured_us: float
    base: stream.Prediction
    pessimistic: stream.Prediction

    def share(self, us: float) -> float:
        """Return what fraction of a copy's bandwidth moves the tensors once in a time."""
        return self.copy_us * self.case.floor / 2 / us

    @property
    def bound(self) -> str:
        """What the consumers wait for most, or the memory if it is hardly ever idle."""
        if not is_stream(self.plan):
            return "reads everything twice"
        if self.base.memory_busy > 0.9:
            return "memory"
        return max(self.base.waits_us, key=lambda name: self.base.waits_us[name])


def predict(
    case: Case, plan: dict[str, object], loops: Sequence[LoopRecord], constants: Constants
) -> stream.Prediction:
    """Return the predicted time of a plan, of either family."""
    if is_stream(plan):
        return stream.predict(case, plan, stream.cycles_of(case, "row" in str(plan["kernel"]), loops), constants)
    (us,) = two_phase.predicted_us(constants, [two_phase.features_of(case, plan, loops)])
    return stream.Prediction(float(us) - constants.dependent_launch_us, math.nan, {})


def predictions(
    group: Group,
    direction: str,
    measured: Sequence[Measurement],
    plan_of: Callable[[Case], dict[str, object]],
    loops: Sequence[LoopRecord],
    constants: Constants,
) -> list[Predicted]:
    """Return the predictions for the cases of a group that were measured, without an epilogue."""
    best: dict[Case, Measurement] = {}
    for m in measured:
        case = m.case
        if (case.direction, case.dtype, case.epilogue) == (direction, group.dtype, "none") and group.has(case):
            if case not in best or m.us < best[case].us:
                best[case] = m
    found = []
    for case, m in best.items():
        plan = plan_of(case)
        base, low = (
            predict(case, plan, loops, dataclasses.replace(constants, **scenario)) for scenario in (BASE, PESSIMISTIC)
        )
        found.append(Predicted(case, plan, m.copy_us, m.us, base, low))
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def report(
    measured: Sequence[Measurement],
    plan_of: Callable[[Case], dict[str, object]],
    loops: Sequence[LoopRecord],
    constants: Constants,
    every_case: bool = False,
) -> str:
    """Return the table of the groups, and with `every_case` what bounds each case."""
    lines = [
        "Shares of a copy's bandwidth, geometric means over the cases. Measured: the best plan of the CSV.",
        "Predicted: what the model says of the plans that are chosen now; no GPU ran them.",
        "",
        f"{'group':30s} {'direction':9s} {'cases':>5s} {'measured':>8s} {'predicted':>9s} {'target':>6s} "
        f"{'predicted, pessimistic':>22s} {'target':>6s}",
    ]
    cases = []
    for group in GROUPS:
        for index, direction in enumerate(DIRECTIONS):
            found = predictions(group, direction, measured, plan_of, loops, constants)
            if not found:
                lines.append(f"{group.name:30s} {direction:9s} {0:5d}")
                continue
            now, base, low = (
                geometric_mean(p.share(us) for p, us in zip(found, times, strict=True))
                for times in (
                    [p.measured_us for p in found],
                    [p.base.us for p in found],
                    [p.pessimistic.us for p in found],
                )
            )
            lines.append(
                f"{group.name:30s} {direction:9s} {len(found):5d} {now:8.2f} {base:9.2f} {group.targets[index]:6.2f} "
                f"{low:22.2f} {group.pessimistic[index]:6.2f}"
            )
            cases += [(group, p) for p in found]
    if every_case:
        lines += ["", "Each case, predicted:"]
        lines += [_describe(group, predicted) for group, predicted in cases]
    return "\n".join(lines)


def _describe(group: Group, p: Predicted) -> str:
    case, plan = p.case, p.plan
    shape = f"{case.outer}x{case.channels}x{case.inner} {case.dtype} {case.direction}"
    geometry = f"{plan['kernel']} {plan['groups']}x{plan['splits']}"
    if is_stream(plan):
        rounds = math.ceil(int(plan["tiles"]) / int(plan["groups"]))
        geometry += f", {rounds} rounds of {plan['chunks_per_tile']} of {plan['chunks']} chunks, ahead {plan['ahead']}"
    waits = ", ".join(f"{name} {us:.1f}" for name, us in p.base.waits_us.items())
    return (
        f"  {group.name}: {shape} {case.tensor_bytes / MB:.1f} MB: {p.base.us:.1f} us, share {p.share(p.base.us):.2f} "
        f"({p.share(p.pessimistic.us):.2f}), bound by {p.bound}; {geometry}; waits in us: {waits or 'none'}"
    )
