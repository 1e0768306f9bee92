"""The time of two-phase plans: a pass for the sums, one that finishes them, and one that reads the elements again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.model.constants import Constants
from bench.model.hot_loops import VECTOR_ELEMENTS
from bench.model.machine import H200, Machine
from bench.model.measurements import MAX_THREADS, Case, reduce_steps
from bench.model.table import LoopRecord

KERNELS = {"forward": ("moments", "normalize"), "backward": ("grad_sums", "input_grad")}
WARPS_PER_SCHEDULER = MAX_THREADS // 32 // 4  # of a block


@dataclass(frozen=True)
class Features:
    """What the time of a plan depends on. Pairs are of the two passes over the elements."""

    rows: bool
    blocks_per_sm: float  # of the SM with the most
    reduce_steps: float  # in which a team of threads adds up the totals of a channel
    kb: tuple[float, float]  # that an SM moves, if all move alike
    lone_kb: tuple[float, float]  # that the SM with the most blocks moves
    cycles: tuple[float, float]  # of a scheduler of that SM


def traffic_of(case: Case) -> tuple[float, float]:
    """Return how many tensors each pass moves, as plan/traffic.h counts them."""
    if case.direction == "forward":
        return 1.0, case.reads + case.writes
    return case.reads, case.reads + case.writes


def features_of(
    case: Case, plan: dict[str, str | int], loops: Sequence[LoopRecord], machine: Machine = H200
) -> Features:
    """`plan` has the keys kernel (channel_tiles or row_tiles, perhaps after two_phase_), groups and splits."""
    rows = str(plan["kernel"]).endswith("row_tiles")
    groups, splits = int(plan["groups"]), int(plan["splits"])
    layout = "(Kernel)1" if rows else "(Kernel)0"
    blocks = groups * splits
    per_sm = math.ceil(blocks / machine.sms)
    bytes_per_pass = [case.tensor_bytes * tensors for tensors in traffic_of(case)]
    kb = tuple(moved / 1e3 / machine.sms for moved in bytes_per_pass)
    lone_kb = tuple(moved / 1e3 / blocks * per_sm for moved in bytes_per_pass)
    vectors = case.tensor_bytes / (VECTOR_ELEMENTS * case.element_bytes * 32 * 4) / blocks * per_sm
    cycles = []
    for kernel in KERNELS[case.direction]:
        loop = next(
            loop for loop in loops if loop.kernel == kernel and loop.dtype == case.dtype and layout in loop.arguments
        )
        resident = machine.registers // (loop.registers * MAX_THREADS)
        cycles.append(vectors * loop.cycles_at(WARPS_PER_SCHEDULER * min(per_sm, resident)))
    steps = reduce_steps(int(plan["channels_per_tile"])) if rows else 0
    return Features(rows, per_sm, steps, kb, lone_kb, tuple(cycles))


def predicted_us(c: Constants, features: Sequence[Features]) -> np.ndarray:
    """Return the time of each plan."""
    columns = {name: np.array([getattr(f, name) for f in features]) for name in Features.__dataclass_fields__}
    memory = np.maximum(columns["kb"] / c.two_phase_bytes_per_ns_sm, columns["lone_kb"] / c.lone_sm_bytes_per_ns)
    issue = columns["cycles"] / c.clock_ghz / 1e3
    per_block = np.where(columns["rows"], c.row_block_us, c.channel_block_us)
    per_block = per_block + c.block_reduce_step_us * columns["reduce_steps"]
    return c.two_phase_us + per_block * columns["blocks_per_sm"] + np.maximum(memory, issue).sum(axis=1)
