"""Comparison of two runs, case by case.

Machines drift by more than code changes, and not uniformly: large tensors may take twice as long in one process as in
another. So a change counts only where it shows twice, in units of torch's time in the same rounds and as time by
itself, both beyond the tolerance and beyond what the spread of the rounds explains.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bench.network_models import is_ours
from bench.results import Measurement, NetworkStep, Results
from fastbn.cli.text import table
from fastbn.measure.implementations import FASTBN, STOCK

TOLERANCE = 0.10
_Record = TypeVar("_Record", Measurement, NetworkStep)


@dataclass(frozen=True)
class Change:
    """The change of one case, new over old. `record` is the new one.

    `time` is divided by the drift of torch's time in the median case; `ratio` is in units of torch's time, where both
    runs have it. `noise` is how far from 1 the spread of the rounds may bring either.
    """

    record: Measurement | NetworkStep
    time: float
    ratio: float
    noise: float

    @property
    def is_regression(self) -> bool:
        return min(self.ratio, self.time) > 1 + max(self.noise, TOLERANCE)

    @property
    def is_improvement(self) -> bool:
        return 1 / max(self.ratio, self.time) > 1 + max(self.noise, TOLERANCE)


@dataclass(frozen=True)
class Comparison:
    """Changes of fastbn, worst first, and by implementation the drift: the median over cases of new time over old.

    Networks drift by themselves, since they compute more than move.
    """

    changes: list[Change]
    drift: dict[str, float]
    network_drift: dict[str, float]
    only_old: int
    only_new: int

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.is_regression]


def compare(old: Results, new: Results) -> Comparison:
    """Compare the cases of layers and networks that both runs timed, and count the others."""
    changes, drift, only_old, only_new = _compare(old.measurements, new.measurements, _is_fastbn)
    of_networks, network_drift, *more = _compare(old.networks, new.networks, is_ours)
    changes = sorted(changes + of_networks, key=lambda change: -change.ratio)
    return Comparison(changes, drift, network_drift, only_old + more[0], only_new + more[1])


def _is_fastbn(name: str) -> bool:
    return name.startswith(FASTBN)


def _compare(
    old: list[_Record], new: list[_Record], is_judged: Callable[[str], bool]
) -> tuple[list[Change], dict[str, float], int, int]:
    """Return the changes of implementations that are judged, the drift, and how many records only one run has."""
    before, after = ({record.key: record for record in records} for records in (old, new))
    both = [key for key in after if key in before]
    times: dict[str, list[float]] = {}
    for key in both:
        times.setdefault(key[-1], []).append(after[key].median_us / before[key].median_us)
    drift = {name: statistics.median(ratios) for name, ratios in times.items()}
    changes = [_change(before, after, key, drift.get(STOCK, 1.0)) for key in both if is_judged(key[-1])]
    return changes, drift, len(before) - len(both), len(after) - len(both)


def _change(old: dict, new: dict, key: tuple, drift: float) -> Change:
    stock = (*key[:-1], STOCK)
    relative = all(STOCK in run[key].speedup_over and stock in run for run in (old, new))
    time = new[key].median_us / old[key].median_us
    # Without torch, drift of the machine cannot be told from a change of the code.
    ratio = old[key].speedup_over[STOCK] / new[key].speedup_over[STOCK] if relative else time
    involved = [run[each] for run in (old, new) for each in ((key, stock) if relative else (key,))]
    # A median varies less than single samples within a process, but as much from one process to the next, which gets
    # other memory pages.
    noise = math.hypot(*((each.p80_us - each.p20_us) / each.median_us for each in involved))
    return Change(new[key], time / drift, ratio, noise)


def lines(comparison: Comparison, shown: int = 20) -> list[str]:
    """Write as plain text the drift of each implementation, the regressions, then the improvements."""
    about = [("", comparison.drift), (" of networks", comparison.network_drift)]
    yields = [
        f"Compared with the earlier run, new time over old, medians over the cases{of}: "
        f"{', '.join(f'{name} {ratio:.3f}' for name, ratio in drift.items())}."
        for of, drift in about
        if drift
    ] or ["Compared with the earlier run: no common case."]
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
    return [*change.record.key, f"{change.ratio:.2f} x", f"({change.time:.2f} x by itself, noise {change.noise:.0%})"]
