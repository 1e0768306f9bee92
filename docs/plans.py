"""Writes docs/plans.md: what fastbn.explain plans for the activations of ResNet-50 on an H200.

python docs/plans.py > docs/plans.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone's bench, wherever this is run from

import fastbn
from bench.workloads import RESNET50

BATCHES = (32, 64, 128, 256)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HEAD = """\
# CUDA plans for ResNet-50

What `fastbn.explain(x, direction, device="h200")` answers for the activations of ResNet-50 in bfloat16, written by
`python docs/plans.py > docs/plans.md`. `design.md` says what the plans are, and what was measured of them.

A cell is the schedule, then blocks, and the kilobytes of shared memory of a block. **T** is two phases, in three
launches, which read twice. `r` after it: the kernel is `row_tiles`, else `channel_tiles`.
"""


def cell(x: torch.Tensor, direction: str) -> str:
    plan = fastbn.explain(x, direction, device="h200")
    rows = "r" if plan.kernel.endswith("row_tiles") else ""
    return f"T{rows} {plan.blocks} {plan.shared_bytes / 1024:.0f}K"


def table(memory_format: torch.memory_format, direction: str) -> list[str]:
    lines = ["| channels @ size | " + " | ".join(f"N = {n}" for n in BATCHES) + " |", "|---" * (len(BATCHES) + 1) + "|"]
    for channels, size in RESNET50:
        shapes = [(n, channels, size, size) for n in BATCHES]
        options = {"dtype": torch.bfloat16, "device": "meta", "memory_format": memory_format}
        cells = [cell(torch.empty(shape, **options), direction) for shape in shapes]
        lines.append(f"| {channels} @ {size} x {size} | " + " | ".join(cells) + " |")
    return lines


def page() -> str:
    lines = [HEAD]
    for name, memory_format in FORMATS.items():
        for direction in ("forward", "backward"):
            lines += [f"## {name}, {direction}", "", *table(memory_format, direction), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
