"""The sizes from which fastbn's ops are faster than torch's operations on a CPU. Calls below them are left to torch.

What makes the difference is the way to the kernel: in a compiled graph a call of an op, which the compiler cannot fuse,
and in eager mode the Python of a call where there is no C++ node (fastbn.backends.node). With the node there is no
crossing: the smallest calls are faster too.

The numbers of elements were measured by `python -m bench.crossings` on one thread of an EPYC 9005 with torch 2.13; the
times are in bench/crossings.json. One crossing serves both memory formats: below it torch is faster in each of
those that were timed, which in compiled graphs is the contiguous one.
"""

from __future__ import annotations

import torch

from fastbn import _torch
from fastbn.backends.node import NODE
from fastbn.ops import dispatch
from fastbn.ops.dispatch import Call

Crossings = dict[str, dict[torch.dtype, int]]

# By what a call computes, in forward and where gradients are recorded in backward; "fused" is with an activation or a
# residual. Without gradients the compiler gets torch's evaluation in any case.
COMPILED: Crossings = {
    "train": {torch.float32: 16384, torch.float64: 16384, torch.bfloat16: 16384, torch.float16: 16384},
    "train, fused": {torch.float32: 16384, torch.float64: 16384, torch.bfloat16: 16384, torch.float16: 16384},
    "frozen": {torch.float32: 16384, torch.float64: 16384, torch.bfloat16: 16384, torch.float16: 16384},
    "frozen, fused": {torch.float32: 8192, torch.float64: 8192, torch.bfloat16: 16384, torch.float16: 16384},
    "train_backward": {torch.float32: 16384, torch.float64: 16384, torch.bfloat16: 16384, torch.float16: 16384},
    "train_backward, fused": {torch.float32: 8192, torch.float64: 8192, torch.bfloat16: 16384, torch.float16: 16384},
}
WITHOUT_NODE: Crossings = {
    "eval": {torch.float32: 8192, torch.float64: 8192, torch.bfloat16: 8192, torch.float16: 32768},
    "train": {torch.float32: 2048, torch.float64: 4096, torch.bfloat16: 4096, torch.float16: 4096},
    "frozen": {torch.float32: 131072, torch.float64: 131072, torch.bfloat16: 65536, torch.float16: 131072},
    "frozen, fused": {torch.float32: 65536, torch.float64: 32768, torch.bfloat16: 32768, torch.float16: 65536},
    "train_backward": {torch.float32: 32768, torch.float64: 32768, torch.bfloat16: 32768, torch.float16: 131072},
    "train_backward, fused": {torch.float32: 16384, torch.float64: 16384, torch.bfloat16: 16384, torch.float16: 32768},
}


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
    operation, way = operation_of(call), "when compiled" if compiled else "without the C++ node"
    crossing = (COMPILED if compiled else WITHOUT_NODE).get(operation, {}).get(call.input.dtype, 0)
    is_below = call.input.numel() < crossing
    # A compiler that does not know the size gets the ops, and no guard on it.
    if not (_torch.is_known_to_compiler(is_below) if compiled else is_below):
        return None
    return f"{way} torch's operations are faster below {crossing} elements ({operation}, {call.input.dtype})"
