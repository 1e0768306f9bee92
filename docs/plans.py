"""Writes docs/plans.md: the CUDA plans for the activations of ResNet-50 on an H200.

python docs/plans.py > docs/plans.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone's bench, wherever this is run from

from bench.workloads import RESNET50
from fastbn import _C
from fastbn.ops import contract

BATCHES = (32, 64, 128, 256)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HEAD = """\
# CUDA plans for ResNet-50

The *planner* chooses how a CUDA kernel walks over a tensor. This page has its choices on an H200 for the activations of
ResNet-50: in bfloat16, in training, without residual and activation. `fastbn.explain(x, direction, device="h200")`
answers the same in words, and `design.md` says what the plans are. The planner chooses by predicted times; no stream
kernel has been measured. `python docs/plans.py > docs/plans.md` writes this page.

| cell | a stream plan, in one launch that reads each tensor once |
|---|---|
| `4x33` | 4 groups of blocks, each with tiles of its own; 33 blocks in a group, which share each tile |
| `r` | the kernel is `row_tiles`; without it, the kernel is `channel_tiles` |
| `+3` | 3 tiles are summed before the first of them is written |
| `/4` | a block has room for its parts of 4 tiles |
| `212K` | shared memory of a block, in KB |

**T** is a two-phase plan, in three launches that read each tensor twice. The numbers after it are the blocks of the
first launch, with `r` as above, and the shared memory of a block.
"""


def planned(x: torch.Tensor, direction: str) -> dict[str, Any]:
    return _C.plan(
        sizes=list(x.shape),
        strides=list(x.stride()),
        dtype=contract.DTYPES.index(x.dtype),
        direction=direction,
        activation=0,
        residual=False,
        aligned=True,
        limits=_C.named_device("h200"),
    )


def cell(x: torch.Tensor, direction: str) -> str:
    plan = planned(x, direction)
    rows = "r" if plan["kernel"].endswith("row_tiles") else ""
    kilobytes = f"{plan['shared_bytes'] / 1024:.0f}K"
    if plan["kernel"].startswith("stream"):
        return f"{plan['groups']}x{plan['splits']}{rows} +{plan['ahead']}/{plan['ring_tiles']} {kilobytes}"
    return f"**T** {plan['blocks']}{rows} {kilobytes}"


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
