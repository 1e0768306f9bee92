"""The constants of the model: what each means, in which range a fit looks for it, and the file of fitted ones."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

FITTED = Path(__file__).with_name("constants.json")
# The plans whose measurements tell a constant.
GROUPS = ("one_pass", "two_phase", "stream")


def _fitted(group: str, start: float, low: float, high: float) -> float:
    return field(default=start, metadata={"group": group, "low": low, "high": high})


@dataclass(frozen=True)
class Constants:
    """Times in microseconds, rates in bytes per nanosecond and SM. A tail is what ends a tile's sums: promotion,
    reduction over the block, and float64 coefficients."""

    # Assumed, since the times tell the clock only together with the memory's rate: what an H200 runs at under load.
    clock_ghz: float = 1.755

    # One-pass plans.
    launch_us: float = _fitted("one_pass", 4.0, 0.5, 12.0)
    load_latency_us: float = _fitted("one_pass", 1.3, 0.7, 3.0)
    bytes_per_ns_sm: float = _fitted("one_pass", 31.0, 10.0, 34.0)
    half_sector_factor: float = _fitted("one_pass", 0.75, 0.3, 1.0)  # of the rate, in float32
    narrow_factor: float = _fitted("one_pass", 0.8, 0.3, 1.0)  # of the rate, for rows of 64 bytes
    channel_tail_us: float = _fitted("one_pass", 3.0, 0.0, 12.0)
    row_tail_us: float = _fitted("one_pass", 5.0, 0.0, 18.0)
    reduce_step_us: float = _fitted("one_pass", 0.1, 0.0, 1.0)
    grid_exchange_us: float = _fitted("one_pass", 4.0, 0.0, 12.0)
    cluster_exchange_us: float = _fitted("one_pass", 1.0, 0.0, 8.0)
    merge_us: float = _fitted("one_pass", 0.2, 0.0, 3.0)  # per 256 sums of other blocks
    wait_us: float = _fitted("one_pass", 0.5, 0.0, 3.0)  # for a residual or a mask that is loaded where it is used

    # Two-phase plans.
    two_phase_us: float = _fitted("two_phase", 12.0, 3.0, 40.0)  # per call
    channel_block_us: float = _fitted("two_phase", 1.3, 0.0, 10.0)  # per block of an SM, in both passes together
    row_block_us: float = _fitted("two_phase", 3.0, 0.0, 12.0)
    block_reduce_step_us: float = _fitted("two_phase", 0.1, 0.0, 1.0)
    two_phase_bytes_per_ns_sm: float = _fitted("two_phase", 29.5, 10.0, 34.0)
    lone_sm_bytes_per_ns: float = _fitted("two_phase", 40.0, 15.0, 200.0)  # that one SM moves while others are idle

    # Estimate of what programmatic dependent launch saves per call. It is 0 where measured calls already have it.
    dependent_launch_us: float = 4.0

    # Stream plans. Nothing has measured them: estimates, until a fit to measured stream plans replaces them.
    stream_launch_us: float = _fitted("stream", 3.5, 1.0, 12.0)
    stream_grid_us: float = _fitted("stream", 1.0, 0.0, 8.0)  # until all blocks of a cooperative launch have started
    stream_latency_us: float = _fitted("stream", 1.3, 0.3, 4.0)  # of a load
    stream_bytes_per_ns_sm: float = _fitted("stream", 31.5, 15.0, 35.0)
    finish_us: float = _fitted("stream", 3.0, 0.3, 15.0)  # from the last sum to the coefficients, with an exchange
    lone_finish_us: float = _fitted("stream", 1.5, 0.3, 10.0)  # without an exchange
    store_queue_kb: float = _fitted("stream", 128.0, 8.0, 256.0)  # that may be queued before consumers pause
    row_64_efficiency: float = _fitted("stream", 0.80, 0.3, 1.0)  # of the memory's rate, by the width of a tile's rows
    row_128_efficiency: float = _fitted("stream", 0.93, 0.3, 1.0)
    row_256_efficiency: float = _fitted("stream", 0.97, 0.3, 1.0)


def fields_of(group: str) -> list[dataclasses.Field[float]]:
    return [field for field in dataclasses.fields(Constants) if field.metadata.get("group") == group]


def read(path: Path = FITTED) -> Constants:
    return Constants(**json.loads(path.read_text())["constants"])


def write(path: Path, constants: Constants, provenance: dict[str, object]) -> None:
    values = dataclasses.asdict(constants)
    path.write_text(json.dumps({"provenance": provenance, "constants": values}, indent=2) + "\n")
