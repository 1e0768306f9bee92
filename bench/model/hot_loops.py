"""Finds the hot loops of a kernel in its machine code, by the marks in its sources.

The hot loop of a mark is the innermost loop of which at least half of the steady state's instructions are hot. A kernel
may have several, as for full chunks and for what is left over, or for short activations and for long ones: the one that
is unrolled the most counts, and of those the shortest one.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.model.flow import COLD_WEIGHT, OTHER_WEIGHT, blocks_of, loops_of, steady_path
from bench.model.marks import Mark
from bench.model.pipes import access_bytes
from bench.model.sass import Function, Instruction

MIN_HOT_SHARE = 0.5
VECTOR_ELEMENTS = 8  # as plan/plan.h has it
ACCESS_BYTES = 16
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

_KERNEL = re.compile(r"(?:^|::)(?P<kind>\w+)_kernel(?:<(?P<arguments>.*)>)?\(")
_DTYPES = {"float": "float32", "double": "float64", "fastbn::bfloat16": "bfloat16", "fastbn::float16": "float16"}


@dataclass(frozen=True)
class Kernel:
    """A kernel's name without its suffix, the type of its elements, and its other template arguments."""

    kind: str
    dtype: str
    arguments: str


@dataclass(frozen=True)
class HotLoop:
    """The steady state of a loop: its instructions in the order in which a warp runs them.

    `function` is the mangled name of its kernel. `dead` are the addresses of the instructions that a predicate switches
    off in the steady state, because they belong to a cold path. `vectors` is how many vectors of 8 elements, of each
    tensor, a thread processes per iteration.
    """

    kernel: Kernel
    function: str
    arch: str
    name: str
    instructions: tuple[Instruction, ...]
    dead: frozenset[int]
    vectors: float

    @property
    def instructions_per_vector(self) -> float:
        return len(self.instructions) / self.vectors


def demangle(names: Sequence[str]) -> list[str]:
    return subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()


def kernel_of(demangled: str) -> Kernel | None:
    """Return what a demangled name says of a kernel, or None for a function that is none of fastbn's."""
    match = _KERNEL.search(demangled)
    if match is None:
        return None
    dtype, _, arguments = (match["arguments"] or "").partition(", ")
    if dtype not in _DTYPES:
        dtype, arguments = "", match["arguments"] or ""
    return Kernel(match["kind"], _DTYPES.get(dtype, ""), arguments.replace("fastbn::", "").replace("cuda::", ""))


class _Lines:
    """Source lines that marks call hot or cold."""

    def __init__(self, marks: Iterable[Mark], root: Path, name: str) -> None:
        self._root = str(root) + "/"
        self._hot: dict[str, list[Mark]] = {}
        self._cold: dict[str, list[Mark]] = {}
        for mark in marks:
            if mark.name in (name, None):
                (self._cold if mark.name is None else self._hot).setdefault(mark.file, []).append(mark)

    def _any(self, marks: dict[str, list[Mark]], instruction: Instruction) -> bool:
        return any(
            mark.first <= frame.line <= mark.last
            for frame in instruction.frames
            for mark in marks.get(frame.file.removeprefix(self._root), ())
        )

    def is_cold(self, instruction: Instruction) -> bool:
        return self._any(self._cold, instruction)

    def is_hot(self, instruction: Instruction) -> bool:
        return self._any(self._hot, instruction) and not self.is_cold(instruction)

    def weight(self, instruction: Instruction) -> float:
        if self.is_cold(instruction):
            # An instruction that is switched off costs no more than its issue.
            return OTHER_WEIGHT if instruction.predicate and instruction.name != "BRA" else COLD_WEIGHT
        return 1.0 if self.is_hot(instruction) else OTHER_WEIGHT


def loaded_tensors(kernel: Kernel) -> int:
    """Return how many tensors the sums of a kernel load, whatever the call: grad_sums may do without the input."""
    return 2 if "backward" in kernel.kind else 1


def vectors_of(path: Iterable[Instruction], kernel: Kernel) -> float:
    """Return how many vectors of 8 a thread processes on a path, by the bytes of its accesses.

    They are those that a stream kernel loads from its ring; else those that it stores to global memory; else those that
    it copies from there, or loads in accesses of 16 bytes, of each of the kernel's tensors. What runs under a predicate
    does not count, and where some copies do, those that do not are of one tensor.
    """
    path = list(path)
    always = [instruction for instruction in path if not instruction.predicate]
    from_ring = sum(access_bytes(i) for i in always if i.name == "LDS" and access_bytes(i) == ACCESS_BYTES)
    if kernel.kind.startswith("stream") and from_ring:
        return from_ring / (VECTOR_ELEMENTS * ELEMENT_BYTES[kernel.dtype] * loaded_tensors(kernel))
    stored = sum(access_bytes(i) for i in always if i.name in ("STG", "ST"))
    copied = sum(access_bytes(i) for i in always if i.name == "LDGSTS")
    loaded = sum(access_bytes(i) for i in always if i.name in ("LDS", "LDG", "LD") and access_bytes(i) == ACCESS_BYTES)
    is_optional = copied and any(i.name == "LDGSTS" and i.predicate for i in path)
    tensors = 1 if stored or is_optional else loaded_tensors(kernel)
    return (stored or copied or loaded) / (VECTOR_ELEMENTS * ELEMENT_BYTES[kernel.dtype] * tensors)


def candidates(function: Function, kernel: Kernel, marks: Iterable[Mark], root: Path, name: str) -> list[HotLoop]:
    """Return the innermost loops of a kernel most of whose steady state is hot, by address."""
    code = function.instructions
    lines = _Lines(marks, root, name)
    if not any(lines.is_hot(instruction) for instruction in code):
        return []
    blocks = blocks_of(code)
    loops = loops_of(blocks)
    weights = {instruction.address: lines.weight(instruction) for instruction in code}
    found: list[tuple[frozenset[int], HotLoop]] = []
    for loop in loops:
        if not any(weights[i.address] > 0 for b in loop.blocks for i in code[blocks[b].first : blocks[b].last + 1]):
            continue
        path = steady_path(code, blocks, loops, loop, lambda instruction: weights[instruction.address])
        if sum(weights[instruction.address] > 0 for instruction in path) < MIN_HOT_SHARE * len(path):
            continue
        dead = frozenset(i.address for i in path if lines.is_cold(i) and i.predicate and i.name != "BRA")
        vectors = vectors_of([instruction for instruction in path if instruction.address not in dead], kernel)
        if vectors > 0:  # else it only waits
            hot = HotLoop(kernel, function.name, function.arch, name, tuple(path), dead, vectors)
            found.append((loop.blocks, hot))
    return [hot for inside, hot in found if not any(other < inside for other, _ in found)]


def hot_loops(functions: Sequence[Function], marks: Sequence[Mark], root: Path) -> list[HotLoop]:
    """Return the hot loops of all kernels. `root` is the folder that the files of the marks are relative to."""
    names = sorted({mark.name for mark in marks if mark.name is not None})
    loops = []
    for function, demangled in zip(functions, demangle([f.name for f in functions]), strict=True):
        kernel = kernel_of(demangled)
        if kernel is None or not kernel.dtype:
            continue
        for name in names:
            found = candidates(function, kernel, marks, root, name)
            if found:
                # Loops are unrolled by powers of two: a residual among the tensors does not make one wider.
                loops.append(min(found, key=lambda hot: (-math.floor(math.log2(hot.vectors)), len(hot.instructions))))
    return loops
