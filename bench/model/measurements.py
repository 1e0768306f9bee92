"""The measurements of bench/plans.cu: a plan and the time it took, per row of a CSV."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.model.hot_loops import ELEMENT_BYTES, VECTOR_ELEMENTS

MAX_THREADS = 256  # per block, of all plans but stream


@dataclass(frozen=True)
class Case:
    """An op: a layout as math/layout.h has it, a direction, and an epilogue of none, relu or add_relu."""

    outer: int
    channels: int
    inner: int
    dtype: str
    direction: str
    epilogue: str = "none"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def tensor_bytes(self) -> int:
        return self.outer * self.channels * self.inner * self.element_bytes

    @property
    def has_mask(self) -> bool:
        run = self.channels if self.inner == 1 else self.inner
        return self.epilogue == "add_relu" and run % VECTOR_ELEMENTS == 0

    @property
    def reads(self) -> float:
        """Tensors that are read at least once; a mask has a bit per element."""
        mask = 1 / (8 * self.element_bytes) if self.has_mask else 0.0
        if self.direction == "forward":
            return 1.0 + (self.epilogue == "add_relu")
        return 2.0 + mask + (self.epilogue == "add_relu" and not self.has_mask)

    @property
    def writes(self) -> float:
        mask = 1 / (8 * self.element_bytes) if self.has_mask and self.direction == "forward" else 0.0
        return 1.0 + mask + (self.epilogue == "add_relu" and self.direction == "backward")

    @property
    def floor(self) -> float:
        """Tensors that a call has to move at least, of which a copy moves 2."""
        return self.reads + self.writes


@dataclass(frozen=True)
class Measurement:
    """A plan, by the names of its columns, and its median time on a case. `copy_us` is that of a copy of the tensor."""

    case: Case
    plan: dict[str, str]
    us: float
    copy_us: float

    @property
    def schedule(self) -> str:
        return self.plan["schedule"]

    @property
    def family(self) -> str:
        """resident (one block per tile), cluster, cooperative, kept (a part of a tile on chip), two_phase or stream."""
        if float(self.plan.get("resident_fraction", 1)) < 1:
            return "kept"
        return "cluster" if int(self.plan.get("cluster", 1)) > 1 else self.schedule

    def number(self, name: str) -> int:
        return int(self.plan[name])


def read(path: Path) -> list[Measurement]:
    """Return the rows of a CSV whose results were right."""
    measured = []
    case_columns = [field.name for field in dataclasses.fields(Case)]
    with path.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if row["wrong"] != "0":
                continue
            values = [row.pop(name) for name in case_columns]
            case = Case(int(values[0]), int(values[1]), int(values[2]), *values[3:])
            measured.append(Measurement(case, row, float(row.pop("us")), float(row.pop("copy_us"))))
    return measured


def reduce_steps(channels_per_tile: int) -> float:
    """Return in how many steps a team of threads of row_tiles adds up the totals of a channel.

    Each thread has 8 totals; the teams are those of by_teams in cuda/block/reduce.cuh.
    """
    team = 32
    while team > 1 and team * channels_per_tile > MAX_THREADS:
        team //= 2
    return MAX_THREADS * VECTOR_ELEMENTS / channels_per_tile / team


def geometric_error(ratios: Iterable[float]) -> float:
    """Return by how much predictions are off: exp(mean |log ratio|) - 1."""
    logs = [abs(math.log(ratio)) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) - 1
