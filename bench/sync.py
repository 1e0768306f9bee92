"""The command `python -m bench.sync`: what synchronised statistics cost between processes on one machine, by gloo.

It times the collectives of fastbn.SyncBatchNorm with what prepares and merges them, and the pattern of
torch.nn.SyncBatchNorm written for a CPU, which that layer refuses: a gather of [ranks, 2C + 1] in float32, a mask that
the host waits for, and a sum of [2C] in float32 in backward. Statistics and normalisation themselves are not timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed

from bench.machine import machine
from fastbn.autograd.statistics import Moments
from fastbn.nn.sync import Group, Synchronize

SIZES = (1, 2, 4)
CHANNELS = (64, 256, 1024, 2048)
ROUNDS, CALLS, WARM_UP = 21, 10, 2
EPS = 1e-5
NOTE = (
    "All processes share the cores of one machine, so more processes than cores wait for one another. A group of one "
    "shows the calls alone: neither layer makes them then."
)


def forward_of_torch(mean: Tensor, inv_std: Tensor, count: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return mean and inv_std of all ranks, in float32, as torch.nn.SyncBatchNorm merges them."""
    channels = len(mean)
    own = torch.cat([mean, inv_std, count])
    gathered = [torch.empty_like(own) for _ in range(group.size)]
    distributed.all_gather(gathered, own)
    means, inv_stds, counts = torch.stack(gathered).split(channels, dim=1)
    mask = counts.squeeze(-1) >= 1
    means, inv_stds, counts = means[mask], inv_stds[mask], counts[mask]
    total = counts.sum(0)
    merged = (means * counts).sum(0) / total
    squares = ((inv_stds.reciprocal().square() - EPS + (means - merged).square()) * counts).sum(0)
    return merged, (squares / total + EPS).rsqrt()


def backward_of_torch(sum_grad: Tensor, sum_grad_xmu: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of all ranks, in float32."""
    sums = torch.cat([sum_grad, sum_grad_xmu])
    distributed.all_reduce(sums)
    return sums.split(len(sum_grad))


def calls_of(channels: int, group: Group) -> dict[tuple[str, str], Callable[[], object]]:
    """Return what is timed, by direction and implementation."""
    generator = torch.Generator().manual_seed(group.rank)
    mean, var = torch.rand(2, channels, generator=generator, dtype=torch.float64) + 0.5
    moments = Moments(mean, var, torch.full((1,), 1000.0, dtype=torch.float64))
    hooks = Synchronize(group)
    of_torch = mean.float(), (var + EPS).rsqrt().float(), torch.full((1,), 1000.0)
    ours, theirs = hooks.merge(moments), forward_of_torch(*of_torch, group)
    # Nothing is timed before both agree: float32 has 7 digits.
    torch.testing.assert_close(ours.mean.float(), theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((ours.var + EPS).rsqrt().float(), theirs[1], rtol=1e-4, atol=1e-4)
    return {
        ("forward", "fastbn"): lambda: hooks.merge(moments),
        ("forward", "torch's pattern"): lambda: forward_of_torch(*of_torch, group),
        ("backward", "fastbn"): lambda: hooks.merge_sums(mean, var),
        ("backward", "torch's pattern"): lambda: backward_of_torch(mean.float(), var.float()),
    }


@torch.no_grad()
def _work(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=size)
    group = Group(distributed.group.WORLD.group_name, size, rank)
    records = []
    for channels in CHANNELS:
        calls = calls_of(channels, group)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for number in range(WARM_UP + ROUNDS):
            for key, call in calls.items():
                distributed.barrier()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                if number >= WARM_UP:
                    times[key].append((time.perf_counter() - start) / CALLS)
        for (direction, implementation), seconds in times.items():
            low, *_, high = statistics.quantiles(seconds, n=5)
            records.append(
                {
                    "processes": size,
                    "channels": channels,
                    "direction": direction,
                    "implementation": implementation,
                    "sent_bytes": bytes_of(channels, direction, implementation),
                    "median_us": round(1e6 * statistics.median(seconds), 1),
                    "p20_us": round(1e6 * low, 1),
                    "p80_us": round(1e6 * high, 1),
                }
            )
    if rank == 0:
        (folder / "records").write_text(json.dumps(records))
    distributed.barrier()
    distributed.destroy_process_group()


def bytes_of(channels: int, direction: str, implementation: str) -> int:
    """Return the bytes that each rank gives to the collective."""
    numbers = 2 * channels + (direction == "forward")
    return numbers * (8 if implementation == "fastbn" else 4)


def measure(size: int) -> list[dict]:
    """Return the records of rank 0 of `size` processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_work, args=(rank, size, Path(folder))) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return json.loads((Path(folder) / "records").read_text())


def table(records: list[dict]) -> str:
    """Return the medians as rows of Markdown: us per layer, fastbn's / torch's pattern."""
    rows = ["| processes | channels | forward | backward |", "|---|---|---|---|"]
    median = {(r["processes"], r["channels"], r["direction"], r["implementation"]): r["median_us"] for r in records}
    for size, channels in dict.fromkeys((r["processes"], r["channels"]) for r in records):
        cells = [
            f"{median[size, channels, direction, 'fastbn']:.0f} / {median[size, channels, direction, torchs]:.0f}"
            for direction in ("forward", "backward")
            for torchs in ("torch's pattern",)
        ]
        rows.append(f"| {size} | {channels} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description=__doc__.partition(":")[2])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times and the machine to FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = [record for size in SIZES for record in measure(size)]
    if args.json:
        lines = ",\n".join(json.dumps(record) for record in records)
        head = f'{{"machine": {json.dumps(machine(torch.device("cpu")))},\n"note": {json.dumps(NOTE)},\n'
        args.json.write_text(f'{head}"records": [\n{lines}\n]}}\n')
    print(table(records))


if __name__ == "__main__":
    main()
