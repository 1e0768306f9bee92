"""The stream plan of a case that the model itself likes best, by the rules of csrc/plan/stream.h and its candidates.

It shows what a planner with a better cost model could choose, and lets the model be used where none is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bench.model import stream
from bench.model.constants import Constants
from bench.model.machine import H200, Machine
from bench.model.measurements import Case
from bench.model.table import LoopRecord

CONSUMERS = 512
UNROLL = {"forward": 4, "backward": 2}
MAX_AHEAD = 3
MIN_RUN_BYTES = 512
MIN_PACKED_ROW = 700
MIN_SPLIT_BYTES = 4096
# Shared memory that is not the ring: barriers, and per-channel numbers and partial sums of the tiles in work; estimate.
RESERVED_BYTES = 24 * 1024


def tiles_of(case: Case) -> Iterator[tuple[str, int, int]]:
    """Yield kernel, channels per tile and vectors of 16 bytes per row of it, for the widths that a tile may have."""
    elements = 16 // case.element_bytes
    if case.inner == 1:
        if case.channels % elements == 0 and case.channels * case.element_bytes >= 64:
            for vectors in (16, 8, 4):
                if vectors == 4 or case.channels > vectors // 2 * elements:
                    yield "stream_row_tiles", vectors * elements, vectors
    elif case.inner % elements == 0 and case.inner * case.element_bytes >= MIN_RUN_BYTES:
        yield "stream_channel_tiles", 1, case.inner // elements
    elif case.inner >= elements:
        channels = 1
        while channels * case.inner % elements != 0:
            channels *= 2
        while channels * case.inner * case.element_bytes < MIN_PACKED_ROW and channels < case.channels:
            channels *= 2
        yield "stream_row_tiles", channels, channels * case.inner // elements


def plans_of(case: Case, machine: Machine = H200) -> Iterator[dict[str, object]]:
    """Yield the stream plans of a case, as csrc/plan describes them."""
    tensors = 1 if case.direction == "forward" else 2 + (case.epilogue == "add_relu" and not case.has_mask)
    for kernel, channels, row_vectors in tiles_of(case):
        rows = kernel == "stream_row_tiles"
        threads = CONSUMERS // row_vectors * row_vectors if rows else CONSUMERS
        chunk_vectors = threads * UNROLL[case.direction]
        chunk_bytes = chunk_vectors * 16 * tensors
        slots = (machine.shared_bytes - RESERVED_BYTES) // chunk_bytes
        tiles = math.ceil(case.channels / channels)
        vectors = case.outer * row_vectors
        unit = row_vectors if rows else 8
        seen = set()
        for rounds in range(math.ceil(tiles / machine.sms), tiles + 1):
            groups = math.ceil(tiles / rounds)
            wanted = max(1, min(machine.sms // groups, vectors * 16 // MIN_SPLIT_BYTES))
            each = math.ceil(math.ceil(vectors / unit) / wanted) * unit
            splits, per_tile = math.ceil(vectors / each), math.ceil(each / chunk_vectors)
            if (groups, splits) in seen:
                continue
            seen.add((groups, splits))
            for ahead in range(min(MAX_AHEAD, rounds - 1) + 1):
                if (ahead + 1) * per_tile <= slots:
                    yield {
                        "kernel": kernel,
                        "tiles": tiles,
                        "groups": groups,
                        "splits": splits,
                        "ahead": ahead,
                        "chunks": min(slots, rounds * per_tile),
                        "chunk_bytes": chunk_bytes,
                        "chunks_per_tile": per_tile,
                        "tensors": tensors,
                        "channels_per_tile": channels,
                        "blocks": groups * splits,
                        "launches": 1,
                        "tensor_reads": case.reads,
                        "tensor_writes": case.writes,
                    }


def best_plan(
    case: Case, loops: Sequence[LoopRecord], scenarios: Sequence[Constants], machine: Machine = H200
) -> dict[str, object] | None:
    """Return the stream plan whose predicted times are the lowest, as a geometric mean over `scenarios`, or None if
    there is none."""
    plans = list(plans_of(case, machine))
    if not plans:
        return None
    cycles = {kernel: stream.cycles_of(case, "row" in kernel, loops) for kernel in {str(p["kernel"]) for p in plans}}

    def product(plan: dict[str, object]) -> float:
        return math.prod(stream.predict(case, plan, cycles[str(plan["kernel"])], c).us for c in scenarios)

    return min(plans, key=product)
