"""Tabulates a CSV of bench/plans.cu: the share of a copy's bandwidth that plans reach, by schedule and tiles ahead.

python -m bench.plan_shares plans.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

CASE = ("outer", "channels", "inner", "dtype", "direction")
# Tensors that an op without an epilogue has to move; a copy moves 2.
FLOOR = {"forward": 2, "backward": 3}
MAX_AHEAD = 3
HEAD = f"{'case':38s} {'copy us':>8s} {'two_phase':>9s} {'stream':>7s}" + "".join(
    f" {f'ahead {ahead}':>8s}" for ahead in range(MAX_AHEAD + 1)
)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of right plans for ops without an epilogue."""
    with path.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [row for row in rows if row["wrong"] == "0" and row["epilogue"] == "none"]


def _share(rows: Iterable[dict[str, str]]) -> str:
    """Return the share of the fastest of some plans for a case."""
    shares = [float(row["copy_us"]) * FLOOR[row["direction"]] / 2 / float(row["us"]) for row in rows]
    return f"{max(shares):.2f}" if shares else "-"


def lines(rows: list[dict[str, str]]) -> list[str]:
    """Return a line per case, in the order of the CSV; the last column is the planner's choice."""
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    table = [f"{HEAD} {'planned':>8s}"]
    for (outer, channels, inner, dtype, direction), plans in cases.items():
        name = f"{outer}x{channels}x{inner} {dtype} {direction}"
        stream = [row for row in plans if row["schedule"] == "stream"]
        by_ahead = ([row for row in stream if int(row["ahead"]) == ahead] for ahead in range(MAX_AHEAD + 1))
        table.append(
            f"{name:38s} {float(plans[0]['copy_us']):8.1f}"
            f" {_share(row for row in plans if row['schedule'] == 'two_phase'):>9s} {_share(stream):>7s}"
            + "".join(f" {_share(some):>8s}" for some in by_ahead)
            + f" {_share(row for row in plans if row['planned'] == '1'):>8s}"
        )
    return table


if __name__ == "__main__":
    print("\n".join(lines(rows_of(Path(sys.argv[1])))))
