"""The time of a stream plan: simulates one block, whose SM gets its share of memory, chunk by chunk.

The producer loads the chunks of tile after tile into the ring as chunks become free. The consumers sum tile k + ahead,
then write tile k, whose coefficients a finisher has made by then. Memory serves loads and stores in the order in which
they are issued, at one rate; a load takes its latency on top. Stores do not wait, except that the consumers pause while
too many bytes are queued.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.model.constants import Constants
from bench.model.hot_loops import VECTOR_ELEMENTS
from bench.model.machine import H200, Machine
from bench.model.measurements import Case
from bench.model.table import LoopRecord

CONSUMER_WARPS = 16  # stream_consumer_warps of plan/stream.h
FINISHERS = 2
SCHEDULERS = 4


@dataclass(frozen=True)
class Prediction:
    us: float
    memory_busy: float  # fraction of the time
    waits_us: dict[str, float]  # of the consumers: for loads, for coefficients, and for stores


@dataclass(frozen=True)
class Cycles:
    """Cycles of a scheduler per vector of one of its warps: in both loops of the consumers, and in the producer's."""

    sums: float
    write: float
    copies: float


def cycles_of(case: Case, rows: bool, loops: Sequence[LoopRecord]) -> Cycles:
    """Return the cycles of the kernel that a case takes. Without a record of copies the producer costs nothing."""
    layout = "(Kernel)1" if rows else "(Kernel)0"
    records = {
        loop.loop: loop
        for loop in loops
        if loop.kernel == f"stream_{case.direction}" and loop.dtype == case.dtype and layout in loop.arguments
    }
    for name in ("sums", "write"):
        if name not in records:
            raise KeyError(f"expected the hot loop {name!r} of stream_{case.direction}, {layout}, {case.dtype}")
    warps = CONSUMER_WARPS / SCHEDULERS
    copies = records["copies"].cycles_at(1) if "copies" in records else 0.0
    return Cycles(records["sums"].cycles_at(warps), records["write"].cycles_at(warps), copies)


def row_efficiency(row_bytes: float, c: Constants) -> float:
    """Return the fraction of the memory's rate at which a tile's pieces of rows are moved."""
    if row_bytes <= 64:
        return c.row_64_efficiency
    return c.row_128_efficiency if row_bytes <= 128 else c.row_256_efficiency


def memory_rate(case: Case, plan: Mapping[str, object], c: Constants, machine: Machine) -> float:
    """Return the kilobytes per microsecond of a block's SM. Where only some SMs have work, each gets more of the
    memory's rate, up to what one can move."""
    blocks = int(plan["groups"]) * int(plan["splits"])
    highest = max(c.lone_sm_bytes_per_ns, c.stream_bytes_per_ns_sm)
    rate = min(c.stream_bytes_per_ns_sm * machine.sms / blocks, highest)
    if "row_tiles" in str(plan["kernel"]) and case.inner == 1 and int(plan["tiles"]) > 1:
        rate *= row_efficiency(int(plan["channels_per_tile"]) * case.element_bytes, c)
    return rate


def vector_kb(case: Case, tensors: float) -> float:
    """Return the kilobytes of a vector of 8 elements of each tensor and lane of a warp."""
    return VECTOR_ELEMENTS * case.element_bytes * 32 * tensors / 1e3


def predict(
    case: Case, plan: Mapping[str, object], cycles: Cycles, c: Constants, machine: Machine = H200
) -> Prediction:
    """Return the time of a plan with the keys kernel, tiles, groups, splits, ahead, chunks, chunk_bytes,
    chunks_per_tile, tensors, channels_per_tile, tensor_reads and tensor_writes, as csrc/plan has them.

    `chunk_bytes` are those of all tensors of a chunk. `producers`, if given, are warps that load chunks side by side.
    """
    number = {key: float(plan[key]) for key in ("tensors", "tensor_reads", "tensor_writes", "chunk_bytes")}
    tiles, groups, splits = int(plan["tiles"]), int(plan["groups"]), int(plan["splits"])
    ahead, slots, per_tile = int(plan["ahead"]), int(plan["chunks"]), int(plan["chunks_per_tile"])
    if (ahead + 1) * per_tile > slots:
        raise ValueError(f"expected a ring of {(ahead + 1) * per_tile} chunks at least, got {slots}")
    rounds = math.ceil(tiles / groups)

    part_kb = case.tensor_bytes * number["tensors"] / tiles / splits / 1e3
    chunk_kb = min(number["chunk_bytes"] / 1e3, part_kb)
    sizes = [chunk_kb] * (per_tile - 1)
    sizes.append(max(part_kb - sum(sizes), 0.1))
    rate = memory_rate(case, plan, c, machine)
    cycles_per_us = c.clock_ghz * 1e3
    per_vector = vector_kb(case, number["tensors"])
    sum_us = [kb / per_vector / SCHEDULERS * cycles.sums / cycles_per_us for kb in sizes]
    write_us = [kb / per_vector / SCHEDULERS * cycles.write / cycles_per_us for kb in sizes]
    copy_us = [kb / per_vector * cycles.copies / cycles_per_us / int(plan.get("producers", 1)) for kb in sizes]
    # Beside what comes through the ring, writing reads a residual or a mask.
    write_kb = [
        kb * (number["tensor_writes"] + number["tensor_reads"] - number["tensors"]) / number["tensors"] for kb in sizes
    ]
    finish_us = c.finish_us if splits > 1 else c.lone_finish_us

    begin = c.stream_launch_us
    memory = producer = begin
    busy = 0.0
    now = begin + (c.stream_grid_us if splits > 1 else 0.0)
    arrived: list[float] = []
    freed: list[float] = []
    ready: list[float] = []
    waits = {"loads": 0.0, "coefficients": 0.0, "stores": 0.0}
    total = rounds * per_tile

    def load_what_fits() -> None:
        nonlocal memory, producer, busy
        while len(arrived) < min(total, slots + len(freed)):
            index = len(arrived)
            size = index % per_tile
            start = max(producer, freed[index - slots] if index >= slots else begin)
            producer = start + copy_us[size]
            memory = max(memory, start) + sizes[size] / rate
            busy += sizes[size] / rate
            arrived.append(max(memory, producer) + c.stream_latency_us)

    for step in range(rounds + ahead):
        if step < rounds:
            for index in range(per_tile):
                load_what_fits()
                time = arrived[step * per_tile + index]
                waits["loads"] += max(0.0, time - now)
                now = max(now, time) + sum_us[index]
            free = ready[step - FINISHERS] if step >= FINISHERS else 0.0
            ready.append(max(now, free) + finish_us)
        if step >= ahead:
            waits["coefficients"] += max(0.0, ready[step - ahead] - now)
            now = max(now, ready[step - ahead])
            for index in range(per_tile):
                queued = memory - now - c.store_queue_kb / rate
                waits["stores"] += max(0.0, queued)
                now += max(0.0, queued) + write_us[index]
                memory = max(memory, now) + write_kb[index] / rate
                busy += write_kb[index] / rate
                freed.append(now)
                load_what_fits()
    end = max(now, memory)
    return Prediction(end, busy / end, waits)
