"""The time of a stream plan as a formula, which a planner can evaluate: close to the simulation of stream.py.

A round of a block, in which it sums a tile and writes one, takes the longest of
- memory's time for the tile, the consumers' time, and half of a finisher's, since two take turns;
- Z + sums + writes over ahead + 1: a tile is written ahead + 1 rounds after its sums began, and Z after they ended;
- a chunk's life over the tiles for which the ring has room beyond those that are ahead: it is loaded behind the stores
  of the tile before, summed, and written `ahead` rounds later, before its place is free for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench.model.constants import Constants
from bench.model.machine import H200, Machine
from bench.model.measurements import Case
from bench.model.stream import FINISHERS, SCHEDULERS, Cycles, memory_rate, vector_kb


@dataclass(frozen=True)
class Round:
    """Microseconds of a round: of the memory for what passes the ring and for the rest, of sums and of writes."""

    load: float
    store: float
    sums: float
    write: float


def round_of(case: Case, plan: Mapping[str, object], cycles: Cycles, c: Constants, machine: Machine = H200) -> Round:
    tensors = float(plan["tensors"])
    kb = case.tensor_bytes * tensors / int(plan["tiles"]) / int(plan["splits"]) / 1e3
    rate = memory_rate(case, plan, c, machine)
    vectors = kb / vector_kb(case, tensors) / SCHEDULERS / (c.clock_ghz * 1e3)
    stored = (float(plan["tensor_reads"]) + float(plan["tensor_writes"]) - tensors) / tensors
    return Round(kb / rate, kb * stored / rate, vectors * cycles.sums, vectors * cycles.write)


def predicted_us(
    case: Case, plan: Mapping[str, object], cycles: Cycles, c: Constants, machine: Machine = H200
) -> float:
    """Return the time of a plan, with the keys that stream.predict takes."""
    part = round_of(case, plan, cycles, c, machine)
    ahead, per_tile = int(plan["ahead"]), int(plan["chunks_per_tile"])
    held = int(plan["chunks"]) / per_tile  # tiles for which the ring has room
    rounds = math.ceil(int(plan["tiles"]) / int(plan["groups"]))
    finish = c.finish_us if int(plan["splits"]) > 1 else c.lone_finish_us
    work = part.sums + part.write
    life = c.stream_latency_us + part.load + part.store + work / per_tile
    round_us = max(
        part.load + part.store,
        work,
        finish / FINISHERS,
        (finish + work) / (ahead + 1),
        life / (held - ahead),
        (life + finish) / held,
    )
    start = c.stream_launch_us + max(c.stream_latency_us, c.stream_grid_us if int(plan["splits"]) > 1 else 0.0)
    first = part.load + part.sums / per_tile
    last = finish + max(part.write, part.store)
    return start + first + (rounds - 1) * round_us + last
