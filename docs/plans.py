"""Writes docs/plans.md: what fastbn.explain plans for the activations of ResNet-50 on an H200.

python docs/plans.py > docs/plans.md
"""

from __future__ import annotations

import re
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
`python docs/plans.py > docs/plans.md`: the plans that the planner expects to be the fastest. `design.md` says what they
are, and what was measured of them.

A cell is the schedule, then blocks, `x` and a cluster's size where there are clusters, and the kilobytes of shared
memory of a block. **R** is `resident`, **C** `cooperative`: both read the input once forward, input and grad_out once
backward, and write once, in one launch. **T** is two phases, in three launches, which read twice. `r` after it: the
kernel is `row_tiles`, else `channel_tiles`. A percentage is the fraction of a channel tile that stays on chip, where
not all of it does; the rest is read again, from L2 or, where S is given, that much of the tensor from memory.
"""


def cell(x: torch.Tensor, direction: str) -> str:
    plan = fastbn.explain(x, direction, device="h200")
    schedule = {"resident": "R", "cooperative": "C"}.get(plan.kernel.split("_")[0], "T")
    rows = "r" if plan.kernel.endswith("row_tiles") else ""
    cluster = f"x{plan.cluster}" if plan.cluster > 1 else ""
    part = re.search(r"keeps (\d+%)", plan.reason)
    again = plan.tensor_reads - (1 if direction == "forward" else 2)
    resident = f" {part[1]}" + (f" +{again:.2f} S" if again else "") if part else ""
    return f"{schedule}{rows} {plan.blocks}{cluster} {plan.shared_bytes / 1024:.0f}K{resident}"


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
