"""The command `python -m bench.crossings`: the sizes from which fastbn's ops are faster than torch's on a CPU.

It times calls of fastbn.functional.batch_norm by the ops and by torch's operations in turns, on one thread, for sizes
that double, and prints the tables of fastbn/backends/crossings.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import machine
from fastbn import functional
from fastbn.backends import crossings
from fastbn.measure.timer import Budget, HostClock, speedup, time_in_turns
from fastbn.ops.contract import DTYPES, HALF_TYPES

SIZES = tuple(2**exponent for exponent in range(10, 18))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Compiling takes seconds per size, so of compiled calls fewer are timed. The compiler gets its own evaluation.
COMPILED_SIZES, COMPILED_FORMATS = SIZES[:5], ("contiguous",)
MODES = ("eval", "train", "frozen", "train_backward")
OPERATIONS = tuple(f"{mode}{fused}" for mode in MODES for fused in ("", ", fused"))
COMPILED_OPERATIONS = OPERATIONS[2:]
BUDGET = Budget(seconds=0.03, warm_up_seconds=0.01, min_rounds=9, max_rounds=101)
# Tables that leave all calls to the ops, and to torch's operations.
BY_OPS: crossings.Crossings = {}
BY_TORCH: crossings.Crossings = {operation: dict.fromkeys(DTYPES, sys.maxsize) for operation in OPERATIONS}


def shape_of(elements: int) -> tuple[int, int, int, int]:
    """Return the shape of a layer of that many elements, with images of 8 x 8, as deep layers have them."""
    channels = min(64, elements // 128)
    return elements // (64 * channels), channels, 8, 8


def call_of(operation: str, dtype: torch.dtype, layout: str, elements: int, compiled: bool, table: dict) -> Callable:
    """Return a call without arguments of functional.batch_norm, while `table` is that of crossings.

    A compiled graph has a relu after it, as networks have, if it is not fused.
    """
    shape = shape_of(elements)
    x, grad_out = (torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[layout]) for _ in range(2))
    param_dtype = torch.float32 if dtype in HALF_TYPES else dtype
    weight, bias, mean, var = (torch.ones(shape[1], dtype=param_dtype) for _ in range(4))
    training, activation = operation.startswith("train"), "relu" if operation.endswith("fused") else None
    leaves = []
    if operation.startswith(("frozen", "train_backward")):
        leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def forward() -> Tensor:
        output = functional.batch_norm(x, mean, var, weight, bias, training, activation=activation)
        return output.relu() if compiled and activation is None else output

    if compiled:
        torch.compiler.reset()
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def call() -> object:
        crossings.COMPILED = crossings.WITHOUT_NODE = table
        output = forward()
        return torch.autograd.grad(output, leaves, grad_out) if leaves else output

    call()
    return call


def measure(compiled: bool) -> Iterator[dict]:
    """Yield torch's time over that of the ops for each operation, dtype, memory format and size."""
    for operation in COMPILED_OPERATIONS if compiled else OPERATIONS:
        for dtype in DTYPES:
            for layout in COMPILED_FORMATS if compiled else FORMATS:
                for elements in COMPILED_SIZES if compiled else SIZES:
                    case = operation, dtype, layout, elements, compiled
                    ours, theirs = time_in_turns(
                        [call_of(*case, BY_OPS), call_of(*case, BY_TORCH)], HostClock(), BUDGET
                    )
                    yield {
                        "way": "compiled" if compiled else "without node",
                        "operation": operation,
                        "dtype": str(dtype),
                        "layout": layout,
                        "elements": elements,
                        "torch_us": round(1e6 * min(theirs), 1),
                        "speedup": round(speedup(ours, theirs), 3),
                    }


def crossing(speedups: Sequence[dict[int, float]]) -> int:
    """Return the smallest size from which the ops are faster in one of the memory formats, given by size for each.

    Where torch is faster at the largest size too, that is returned: what is beyond it was not measured.
    """
    slow = [size for size in sorted(speedups[0])[:-1] if all(by_size[size] < 1 for by_size in speedups)]
    sizes = sorted(speedups[0])
    return sizes[sizes.index(slow[-1]) + 1] if slow else 0


def tables(records: Sequence[dict], way: str) -> crossings.Crossings:
    """Return the crossings of one way by operation and dtype, without operations whose crossings are all 0."""
    result: crossings.Crossings = {}
    for operation in OPERATIONS:
        for dtype in DTYPES:
            by_layout: dict[str, dict[int, float]] = {}
            for record in records:
                if (record["way"], record["operation"], record["dtype"]) == (way, operation, str(dtype)):
                    by_layout.setdefault(record["layout"], {})[record["elements"]] = record["speedup"]
            result.setdefault(operation, {})[dtype] = crossing(list(by_layout.values())) if by_layout else 0
    return {operation: sizes for operation, sizes in result.items() if any(sizes.values())}


def source(name: str, table: crossings.Crossings) -> str:
    """Return a table as fastbn/backends/crossings.py has it."""
    rows = (f'    "{operation}": _sizes{tuple(sizes.values())},' for operation, sizes in table.items())
    return "\n".join([f"{name}: Crossings = {{", *rows, "}"])


def text(machine: dict, records: Sequence[dict]) -> str:
    """Return JSON with one record per line."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{{"machine": {json.dumps(machine)},\n"records": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossings", description=__doc__.partition(":")[2])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times and the machine to FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    functional.NODE = crossings.NODE = None
    records = []
    for compiled in (False, True):
        for record in measure(compiled):
            records.append(record)
            print(*record.values(), sep=", ", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(text(machine(torch.device("cpu")), records))
    print(source("COMPILED", tables(records, "compiled")))
    print(source("WITHOUT_NODE", tables(records, "without node")))


if __name__ == "__main__":
    main()
