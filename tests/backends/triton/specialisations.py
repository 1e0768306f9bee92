"""Prints how many kernels Triton would compile for training steps, in all, after each of some batch sizes.

It is for a process without TRITON_INTERPRET, and needs no GPU: nothing is compiled or launched.
"""

from __future__ import annotations

import collections
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastbn.backends.triton import ops

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
compiled: dict[str, set[str]] = collections.defaultdict(set)


def _record(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialization, options = bind(*args, **kwargs)
    compiled[kernel.__name__].add(f"{specialization} {options}")


def main() -> None:
    channels, inner, *sizes = map(int, sys.argv[1:])
    JITFunction.run = _record
    weight, stats = torch.ones(channels), torch.ones(channels, dtype=torch.float64)
    counter = torch.tensor(0)
    for n in sizes:
        x = torch.empty((n, channels, inner) if inner > 1 else (n, channels), dtype=torch.bfloat16)
        buffers = weight, weight, counter, 0.1 + n
        ops.batch_norm_train(x, None, weight, weight, *buffers, 1e-5, 1, False)
        ops.batch_norm_backward(x, x, None, None, weight, weight, stats, stats, True, 1, True, True, True, False)
        print(sum(map(len, compiled.values())))


main()
