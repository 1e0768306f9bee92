"""The time of the one-pass plans of bench/results/h200-plans.csv, whose blocks keep a channel tile on chip.

A block loads its part of a tile and sums it as it arrives; its group exchanges the sums; then it writes the output, and
a cooperative plan loads its next tile meanwhile. So memory idles from the arrival of a tile's last byte until the first
byte of its output: for a quarter of the sums (the last of four stages), the tail of the tile, and the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.model.constants import Constants
from bench.model.hot_loops import VECTOR_ELEMENTS
from bench.model.machine import H200, Machine
from bench.model.measurements import MAX_THREADS, Measurement, reduce_steps
from bench.model.table import LoopRecord

WARPS_PER_SCHEDULER = MAX_THREADS // 32 // 4  # of a block
L2_FRACTION = 0.5  # of L2 that holds what is read again, as plan/candidates.h estimates


@dataclass(frozen=True)
class Features:
    """What the time of a plan depends on, per SM and round: `blocks` blocks of it at a time, one tile each."""

    blocks: int
    rounds: int
    cooperative: bool
    cluster: bool
    rows: bool
    wide_elements: bool  # float32, whose lanes are 32 bytes apart
    load_kb: float
    store_kb: float
    reread_kb: float
    sum_cycles: float  # of a scheduler
    output_cycles: float
    waits: float  # of a thread for a load from memory that it does not start early: of a residual or a mask
    merged_sums: float  # of other blocks, that a cooperative plan's block merges
    reduce_steps: float  # in which a team of threads adds up the totals of a channel
    narrow: bool


def _shared_bytes(plan: Measurement, per_tile: int, tensors: int) -> int:
    """Return the shared memory of a block, as plan/shared_memory.h maps it."""
    rows, backward = plan.plan["kernel"] == "row_tiles", plan.case.direction == "backward"
    totals = 2 * (VECTOR_ELEMENTS if rows else 1) * MAX_THREADS * 8 + MAX_THREADS // 32 * 4
    exchange = 2 * 16 * per_tile if plan.schedule == "resident" else 0
    coefficients = (6 if backward else 3) * 4 * per_tile
    slots = plan.number("slots") * tensors * MAX_THREADS * VECTOR_ELEMENTS * plan.case.element_bytes
    return totals + 32 * per_tile + exchange + coefficients + slots


def _blocks_and_rounds(plan: Measurement, tiles: int, shared_bytes: int, machine: Machine) -> tuple[int, int]:
    groups, splits, cluster = (plan.number(name) for name in ("groups", "splits", "cluster"))
    blocks = groups * splits
    if plan.schedule == "cooperative":
        return math.ceil(blocks / machine.sms), math.ceil(tiles / groups)
    rows, backward = plan.plan["kernel"] == "row_tiles", plan.case.direction == "backward"
    compiled = 1 if backward and rows and plan.case.element_bytes == 4 else 2
    room = (machine.shared_bytes + machine.reserved_shared_bytes) // (shared_bytes + machine.reserved_shared_bytes)
    per_sm = min(compiled, room)
    # Clusters of four and more do not fill the groups of SMs that they must lie in.
    reached = machine.sms if cluster <= 2 else max(1, machine.sms * 7 // 8 // cluster) * cluster
    return min(per_sm, math.ceil(blocks / reached)), math.ceil(blocks / (reached * per_sm))


def features_of(plan: Measurement, loops: Sequence[LoopRecord], machine: Machine = H200) -> Features:
    case, rows = plan.case, plan.plan["kernel"] == "row_tiles"
    element, fold, per_tile = case.element_bytes, plan.number("fold"), plan.number("channels_per_tile")
    vectors_per_row, splits, slots = plan.number("vectors_per_row"), plan.number("splits"), plan.number("slots")
    tensors = 1 if case.direction == "forward" else 2 + (case.epilogue == "add_relu" and not case.has_mask)
    tiles = 1 if fold > 1 else math.ceil(case.channels / per_tile)
    items = math.ceil(case.outer / fold) if rows else case.outer * math.ceil(case.inner / VECTOR_ELEMENTS)
    items_per_block = math.ceil(items / splits)
    per_thread = math.ceil(items_per_block / (MAX_THREADS // vectors_per_row))
    blocks, rounds = _blocks_and_rounds(plan, tiles, _shared_bytes(plan, per_tile, tensors), machine)

    tensor_kb = items_per_block * vectors_per_row * VECTOR_ELEMENTS * element * blocks / 1e3
    kept = min(1.0, slots / per_thread)
    tile_bytes = case.tensor_bytes / tiles * tensors
    hits = machine.l2_bytes * L2_FRACTION / tile_bytes
    reread = max(0.0, 1 - kept - hits)

    kernel = f"resident_{case.direction}"
    warps = WARPS_PER_SCHEDULER * blocks
    layout = "(Kernel)1" if rows else "(Kernel)0"
    cycles = {
        loop.loop: loop.cycles_at(warps) * per_thread * warps
        for loop in loops
        if loop.kernel == kernel and loop.dtype == case.dtype and layout in loop.arguments
    }
    unroll = 2 if element == 2 and not rows else 1  # unroll_of in plan/plan.h
    waits = 0 if case.epilogue != "add_relu" else 1 if case.direction == "forward" else 2 * case.has_mask
    return Features(
        blocks,
        rounds,
        plan.schedule == "cooperative",
        plan.number("cluster") > 1,
        rows,
        element == 4,
        tensor_kb * tensors,
        tensor_kb * (case.floor - tensors),
        tensor_kb * tensors * reread,
        cycles["sums"],
        cycles["write"],
        waits * per_thread / unroll,
        per_tile * splits * blocks if plan.schedule == "cooperative" and rows else 0,
        reduce_steps(per_tile) if rows else 0,
        rows
        and case.inner == 1
        and tiles > 1
        and plan.number("groups") * vectors_per_row * VECTOR_ELEMENTS * element <= 64,
    )


def predicted_us(constants: Constants, features: Sequence[Features]) -> np.ndarray:
    """Return the time of each plan."""
    columns = {name: np.array([getattr(f, name) for f in features]) for name in Features.__dataclass_fields__}
    c = constants
    rows, cooperative = columns["rows"], columns["cooperative"]
    rate = c.bytes_per_ns_sm * np.where(columns["wide_elements"], c.half_sector_factor, 1)
    rate = rate * np.where(columns["narrow"], c.narrow_factor, 1)
    load, store = columns["load_kb"] / rate, columns["store_kb"] / rate
    reread = columns["reread_kb"] / rate
    sums = columns["sum_cycles"] / c.clock_ghz / 1e3
    output = columns["output_cycles"] / c.clock_ghz / 1e3 + c.wait_us * columns["waits"]
    idle = np.where(rows, c.row_tail_us, c.channel_tail_us)
    idle = idle + np.where(cooperative, c.grid_exchange_us, np.where(columns["cluster"], c.cluster_exchange_us, 0))
    idle = idle + c.merge_us * columns["merged_sums"] / 256 + c.reduce_step_us * columns["reduce_steps"]
    first = c.load_latency_us + np.maximum(load, 0.75 * sums) + sums / 4 + idle
    last = np.maximum(output, store + reread)
    both = c.load_latency_us + np.maximum(output, load + store + reread) + sums / 4
    steady = np.maximum(output + sums, both) + idle
    return c.launch_us + np.where(
        cooperative, first + (columns["rounds"] - 1) * steady + last, columns["rounds"] * (first + last)
    )
