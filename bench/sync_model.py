"""The command `python -m bench.sync_model`: a prediction of what synchronised statistics take on many GPUs.

time = latency of the collective + bytes received / bandwidth. Latencies are those by which NCCL chooses an algorithm
(`baseLat` and `hwLat` of its src/graph/tuning.cc, commit 01afd20a): a base, and a number for each step within a node
and between nodes. A ring gathers in p - 1 steps, nodes - 1 of them between nodes; a tree adds up in 2 (g - 1) steps
within a node of g GPUs and 2 log2(nodes) between nodes. Nothing here was measured on GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastbn.nn.sync import MAX_GATHERED_RANKS

GPUS_PER_NODE = 8
# NCCL's protocols, each with (base, step within a node, step between nodes) in us for a ring and for a tree, and the
# shares of the bandwidth that they reach. Within a node of several, NCCL takes the steps of the first to be 1.8 times
# as long. It uses the protocol that it predicts to be the fastest.
PROTOCOLS = {
    "LL": ((3.6, 0.47, 2.7), (4.4, 0.52, 5.0), 1 / 4),
    "LL128": ((10.0, 1.9, 4.0), (4.4, 1.2, 8.5), 0.92),
    "Simple": ((8.4, 3.4, 9.6), (0.0, 28.0, 50.0), 1.0),
}
SLOWER_BESIDE_A_NETWORK = {"LL": 1.8}
# GB/s of one GPU: assumptions, of an H100 by NVLink and of a 400 Gbit/s adapter for each GPU.
NVLINK, NETWORK = 300.0, 50.0


@dataclass(frozen=True)
class Prediction:
    """The time in us of one collective, and the bytes that each rank receives."""

    total_us: float
    received_bytes: int


def _fastest(ranks: int, steps: Callable[[int, int], tuple[float, float]], algorithm: int, received: int) -> Prediction:
    """Predict a collective. steps: returns those within and between nodes for numbers of nodes and of GPUs in each."""
    nodes = max(1, ranks // GPUS_PER_NODE)
    within, between = steps(nodes, ranks // nodes)
    times = []
    for protocol, (*latencies, share) in PROTOCOLS.items():
        base, in_node, network = latencies[algorithm]
        slower = SLOWER_BESIDE_A_NETWORK.get(protocol, 1.0) if nodes > 1 else 1.0
        bytes_per_us = 1e3 * share * (NETWORK if nodes > 1 else NVLINK)
        times.append(base + within * in_node * slower + between * network + received / bytes_per_us)
    return Prediction(min(times), received)


def gather(ranks: int, bytes_per_rank: int) -> Prediction:
    """Predict an all_gather by a ring."""
    return _fastest(ranks, lambda nodes, _: (ranks - nodes, nodes - 1), 0, (ranks - 1) * bytes_per_rank)


def add_up(ranks: int, size: int) -> Prediction:
    """Predict an all_reduce of `size` bytes by a tree."""
    return _fastest(ranks, lambda nodes, per_node: (2 * (per_node - 1), 2 * math.log2(nodes)), 1, 2 * size)


def add_up_twice(ranks: int, channels: int) -> Prediction:
    """Predict the forward of large groups: the sums of means and counts, then those of squares."""
    first, second = add_up(ranks, 8 * (channels + 1)), add_up(ranks, 8 * channels)
    return Prediction(first.total_us + second.total_us, first.received_bytes + second.received_bytes)


def row(ranks: int, channels: int) -> str:
    """Return a row of the table, the way that fastbn takes in bold."""
    gathered, of_torch = (gather(ranks, width * (2 * channels + 1)) for width in (8, 4))
    added, backward = add_up_twice(ranks, channels), add_up(ranks, 8 * 2 * channels)
    ways = [f"{way.received_bytes / 1e3:.0f} kB, {way.total_us:.0f} us" for way in (gathered, added)]
    chosen = int(ranks > MAX_GATHERED_RANKS)
    ways[chosen] = f"**{ways[chosen]}**"
    return f"| {ranks} | {channels} | {ways[0]} | {ways[1]} | {of_torch.total_us:.0f} us | {backward.total_us:.0f} us |"


COLUMNS = "GPUs", "channels", "forward: gather", "forward: two sums", "torch's gather", "backward"


def table() -> str:
    """Return the predictions in Markdown, as docs/scaling.md has them."""
    rows = [row(ranks, channels) for ranks in (8, 16, 32, 64, 256, 1024) for channels in (64, 512, 2048)]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows])


if __name__ == "__main__":
    print(table())
