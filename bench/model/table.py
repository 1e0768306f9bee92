"""The table of hot loops: instructions and cycles per vector, by kernel, element type and loop, as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.model import pipes
from bench.model.compile import ARCH, Resources, compile_cubin
from bench.model.hot_loops import HotLoop, hot_loops
from bench.model.issue import cycles_per_iteration
from bench.model.marks import Mark, find_marks
from bench.model.sass import disassemble

WARPS = (1, 2, 4, 8)
DTYPES = ("bfloat16", "float32")  # float16 differs from bfloat16 in its conversions alone


@dataclass(frozen=True)
class LoopRecord:
    """A hot loop in numbers. A vector is 8 elements of each tensor and lane, so 32 * 8 elements of a warp.

    `cycles` are those of a scheduler per vector of one of its warps, by the number of warps per scheduler.
    """

    kernel: str
    dtype: str
    arguments: str
    loop: str
    vectors_per_iteration: float
    instructions: float
    cycles: dict[int, float]
    pipes: dict[str, float]
    registers: int

    def cycles_at(self, warps: float) -> float:
        """Return the cycles at any number of warps, by linear interpolation of instructions per cycle."""
        known = sorted(self.cycles)
        warps = min(max(warps, known[0]), known[-1])
        below = max(count for count in known if count <= warps)
        above = min(count for count in known if count >= warps)
        if below == above:
            return self.cycles[below]
        share = (warps - below) / (above - below)
        return 1 / ((1 - share) / self.cycles[below] + share / self.cycles[above])


def record_of(loop: HotLoop, resources: Resources, latency: dict[str, int] | None = None) -> LoopRecord:
    # The producer is one warp, and the path to memory is its own while consumers wait for what it loads.
    schedulers = 1 if loop.name == "copies" else pipes.SCHEDULERS
    counts = Counter(pipes.use_of(i).pipe for i in loop.instructions if i.address not in loop.dead)
    return LoopRecord(
        loop.kernel.kind,
        loop.kernel.dtype,
        loop.kernel.arguments,
        loop.name,
        loop.vectors,
        round(loop.instructions_per_vector, 2),
        {
            warps: round(
                cycles_per_iteration(loop.instructions, warps, loop.dead, latency, schedulers) / (warps * loop.vectors),
                1,
            )
            for warps in WARPS
        },
        {pipe: round(count / loop.vectors, 2) for pipe, count in sorted(counts.items())},
        resources.registers,
    )


def loops_of_source(
    source: Path, include: Path, marks: Sequence[Mark], arch: str = ARCH, dtypes: Iterable[str] = DTYPES
) -> list[tuple[HotLoop, Resources]]:
    """Compile a source and return its hot loops, with what ptxas says of their kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        resources = compile_cubin(source, include, cubin, arch)
        functions = disassemble(cubin)
    found = hot_loops(functions, marks, include)
    return [(loop, resources[loop.function]) for loop in found if loop.kernel.dtype in dtypes]


def loops_of_sources(include: Path, marks: Sequence[Mark] | None = None, arch: str = ARCH) -> list[LoopRecord]:
    """Return the hot loops of all kernels below `include`, the folder csrc of a clone.

    By default the marks are the sources' own. Kernels of unaligned tensors have `false` among their arguments, and are
    left out: their loops choose an access for each vector.
    """
    marks = find_marks(include) if marks is None else marks
    sources = sorted((include / "cuda" / "kernels").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda source: loops_of_source(source, include, marks, arch), sources))
    aligned = [(loop, used) for loops in found for loop, used in loops if "false" not in loop.kernel.arguments]
    return [record_of(loop, used) for loop, used in aligned]


def write(path: Path, records: Sequence[LoopRecord], provenance: dict[str, str]) -> None:
    loops = [dataclasses.asdict(record) for record in records]
    lines = ",\n    ".join(json.dumps(loop) for loop in loops)
    path.write_text(f'{{\n  "provenance": {json.dumps(provenance)},\n  "loops": [\n    {lines}\n  ]\n}}\n')


def read(path: Path) -> list[LoopRecord]:
    loops = json.loads(path.read_text())["loops"]
    return [LoopRecord(**{**loop, "cycles": {int(w): c for w, c in loop["cycles"].items()}}) for loop in loops]


def with_missing(records: Sequence[LoopRecord], others: Sequence[LoopRecord]) -> list[LoopRecord]:
    """Return the records, and those of the other ones whose kernel and type of elements they lack."""
    known = {(record.kernel, record.dtype) for record in records}
    return [*records, *(record for record in others if (record.kernel, record.dtype) not in known)]


def text(records: Sequence[LoopRecord]) -> str:
    """Return the records as a table."""
    head = f"{'kernel':52s} {'loop':8s} {'regs':>4s} {'instr':>6s}" + "".join(f" {f'W={w}':>6s}" for w in WARPS)
    lines = [f"{head}  by pipe, all per vector of 8"]
    for record in records:
        name = f"{record.kernel}<{record.dtype}{', ' if record.arguments else ''}{record.arguments}>"
        cycles = "".join(f" {record.cycles[warps]:6.1f}" for warps in WARPS)
        by_pipe = " ".join(f"{pipe} {count:g}" for pipe, count in record.pipes.items())
        lines.append(f"{name:52s} {record.loop:8s} {record.registers:4d} {record.instructions:6.1f}{cycles}  {by_pipe}")
    return "\n".join(lines)
