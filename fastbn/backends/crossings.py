"""The numbers of elements below which calls on a CPU are left to torch's operations, because those are faster there.

They are so in compiled graphs, which cannot fuse an op, and in eager calls from Python; with the C++ node not even in
the smallest. `python -m bench.crossings` measures them (bench/crossings.json: one thread of an EPYC 9005, torch 2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fastbn import _torch
from fastbn.backends.node import NODE
from fastbn.ops import dispatch
from fastbn.ops.contract import DTYPES
from fastbn.ops.dispatch import Call

Crossings = dict[str, dict[torch.dtype, int]]


def _sizes(*sizes: int) -> dict[torch.dtype, int]:
    """Return numbers of elements by dtype: of float32, float64, bfloat16 and float16, the order of DTYPES."""
    return dict(zip(DTYPES, sizes, strict=True))


# By what a call computes, with its backward where that is recorded; "fused" is with an activation or a residual. Below
# a crossing torch was faster in each memory format that was timed (in compiled graphs, contiguous). 16384 compiled, and
# 131072 without the node, are the largest sizes that were timed: torch may be faster beyond them. Without gradients the
# compiler gets torch's evaluation whatever its size.
COMPILED: Crossings = {
    "train": _sizes(16384, 16384, 16384, 16384),
    "train, fused": _sizes(16384, 16384, 16384, 16384),
    "frozen": _sizes(16384, 16384, 16384, 16384),
    "frozen, fused": _sizes(8192, 8192, 16384, 16384),
    "train_backward": _sizes(16384, 16384, 16384, 16384),
    "train_backward, fused": _sizes(8192, 8192, 16384, 16384),
}
WITHOUT_NODE: Crossings = {
    "eval": _sizes(8192, 8192, 8192, 32768),
    "train": _sizes(2048, 4096, 4096, 4096),
    "frozen": _sizes(131072, 131072, 65536, 131072),
    "frozen, fused": _sizes(65536, 32768, 32768, 65536),
    "train_backward": _sizes(32768, 32768, 32768, 131072),
    "train_backward, fused": _sizes(16384, 16384, 16384, 32768),
}


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Give the ops calls of every size, for tests and comparisons of them."""
    global COMPILED, WITHOUT_NODE
    before = COMPILED, WITHOUT_NODE
    COMPILED, WITHOUT_NODE = {}, {}
    try:
        yield
    finally:
        COMPILED, WITHOUT_NODE = before


def operation_of(call: Call) -> str:
    """Return the name by which the tables know a call."""
    recorded = dispatch.is_recorded(call)
    if call.training:
        name = "train_backward" if recorded else "train"
    else:
        name = "frozen" if recorded else "eval"
    fused = call.activation != 0 or call.residual is not None
    return f"{name}, fused" if fused else name


def why_torch_is_faster(call: Call) -> str | None:
    """Return why a call on a CPU is left to torch for its size, or None where fastbn's ops are faster."""
    if not call.input.is_cpu:
        return None
    compiled = torch.compiler.is_compiling()
    if not compiled and NODE is not None:
        return None
    if compiled and call.momentum is None and call.num_batches_tracked is not None:
        return None  # torch's function takes the momentum as a number, and reading the counter would break the graph
    operation, way = operation_of(call), "when compiled" if compiled else "without the C++ node"
    crossing = (COMPILED if compiled else WITHOUT_NODE).get(operation, {}).get(call.input.dtype, 0)
    is_below = call.input.numel() < crossing
    # A compiler that does not know the size gets the ops, and no guard on it.
    if not (_torch.is_known_to_compiler(is_below) if compiled else is_below):
        return None
    return f"{way} torch's operations are faster below {crossing} elements ({operation}, {call.input.dtype})"
