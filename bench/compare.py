"""Two runs against each other, case by case.

Machines drift by more than code changes. So where both runs timed torch in the same rounds, an implementation's time is
taken in units of torch's, and what is left is the change of the implementation. A change counts where it is larger than
the tolerance and than the spread of both runs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from bench.results import Measurement, Results
from fastbn.cli.text import table

STOCK, JUDGED = "torch", "fastbn"
TOLERANCE = 0.10


@dataclass(frozen=True)
class Change:
    """`ratio`: new time over old, each over torch's of its run if `relative`; `noise`: its spread without a change."""

    measurement: Measurement
    ratio: float
    noise: float
    relative: bool

    @property
    def is_regression(self) -> bool:
        return self.ratio > 1 + max(self.noise, TOLERANCE)

    @property
    def is_improvement(self) -> bool:
        return 1 / self.ratio > 1 + max(self.noise, TOLERANCE)


@dataclass(frozen=True)
class Comparison:
    """changes: of fastbn, the worst first. drift: by implementation, the median over cases of new time over old."""

    changes: list[Change]
    drift: dict[str, float]
    only_old: int
    only_new: int

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.is_regression]


def compare(old: Results, new: Results) -> Comparison:
    """Cases that both runs timed; the others are counted."""
    before = {measurement.key: measurement for measurement in old.measurements}
    after = {measurement.key: measurement for measurement in new.measurements}
    both = [key for key in after if key in before]
    times = {}
    for key in both:
        times.setdefault(key[-1], []).append(after[key].median_us / before[key].median_us)
    judged = [key for key in both if key[-1].startswith(JUDGED)]
    changes = sorted((_change(before[key], after[key]) for key in judged), key=lambda change: -change.ratio)
    drift = {name: statistics.median(ratios) for name, ratios in times.items()}
    return Comparison(changes, drift, len(before) - len(both), len(after) - len(both))


def _change(old: Measurement, new: Measurement) -> Change:
    relative = STOCK in old.speedup_over and STOCK in new.speedup_over
    ratio = old.speedup_over[STOCK] / new.speedup_over[STOCK] if relative else new.median_us / old.median_us
    return Change(new, ratio, sum((m.p80_us - m.p20_us) / m.median_us for m in (old, new)), relative)


def lines(comparison: Comparison, shown: int = 20) -> list[str]:
    """Plain text: the drift of each implementation, regressions first, then the other changes that count."""
    drift = ", ".join(f"{name} {ratio:.3f}" for name, ratio in comparison.drift.items())
    yields = [f"Compared with the earlier run, new time over old, medians over the cases: {drift or 'no common case'}."]
    if comparison.only_old or comparison.only_new:
        yields.append(f"Not in both: {comparison.only_old} of the earlier run, {comparison.only_new} of this one.")
    improvements = [change for change in reversed(comparison.changes) if change.is_improvement]
    for what, changes in (("regressions", comparison.regressions), ("improvements", improvements)):
        beyond = (
            f"{len(changes)} {what} of {len(comparison.changes)} cases (by more than {TOLERANCE:.0%} and the noise)"
        )
        yields.append(f"{beyond}{':' if changes else '.'}")
        yields += table([_row(change) for change in changes[:shown]], left=(0, 1, 2, 3)) if changes else []
        if len(changes) > shown:
            yields.append(f"and {len(changes) - shown} more")
    return yields


def _row(change: Change) -> list[str]:
    measurement = change.measurement
    unit = f"x its time over {STOCK}'s" if change.relative else "x its time"
    about = [measurement.case, measurement.dtype, measurement.op, measurement.implementation]
    return [*about, f"{change.ratio:.2f} {unit}", f"noise {change.noise:.0%}"]
