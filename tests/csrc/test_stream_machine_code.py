"""The hot loops of the stream kernels as nvcc compiles them for sm_90: how many instructions they take, and of what.

bench/model finds the loops by the marks in the sources and counts; no GPU is needed.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest

from bench.model import checks, table
from bench.model.hot_loops import HotLoop
from bench.model.marks import find_marks

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DTYPES = ("bfloat16", "float16", "float32")
# Per vector of 8 elements, the sums and the writes of a call without residual and mask together.
MAX_INSTRUCTIONS = {"forward": 95, "backward": 150}
# More would leave fewer than 20 warps to an SM.
MAX_REGISTERS = 96
# Cycles of a scheduler with 4 warps per vector, forward in half types. A copy's bandwidth leaves it 220.
MAX_CYCLES = 115
FORBIDDEN = {"MEMBAR", "ERRBAR", "CCTL", "LDL", "STL", "LDC"}
# Backward by rows has no register left for the step of its walk, and loads it once per chunk when it writes.
ALLOWED = {("backward", "row_tiles", "write"): {"LDC"}}

KERNELS = {"(Kernel)0": "channel_tiles", "(Kernel)1": "row_tiles"}

pytestmark = pytest.mark.slow


@functools.cache
def _loops(direction: str) -> list:
    if shutil.which("nvcc") is None:
        if os.environ.get("FASTBN_REQUIRE_NVCC") == "1":
            pytest.fail("FASTBN_REQUIRE_NVCC=1, but nvcc was not found", pytrace=False)
        pytest.skip("needs nvcc")
    source = CSRC / "cuda" / "kernels" / f"stream_{direction}.cu"
    return table.loops_of_source(source, CSRC, find_marks(CSRC), dtypes=DTYPES)


def _by_kernel(direction: str) -> dict[tuple[str, str], dict[str, HotLoop]]:
    kernels: dict[tuple[str, str], dict[str, HotLoop]] = {}
    for loop, _ in _loops(direction):
        kernels.setdefault((loop.kernel.dtype, loop.kernel.arguments), {})[loop.name] = loop
    assert len(kernels) == 2 * len(DTYPES), kernels.keys()
    assert all(loops.keys() == {"copies", "sums", "write"} for loops in kernels.values())
    return kernels


@pytest.mark.parametrize("direction", MAX_INSTRUCTIONS)
def test_hot_loops_are_lean(direction: str) -> None:
    for kernel, loops in _by_kernel(direction).items():
        visits = [loops["sums"], loops["write"]]
        total = sum(loop.instructions_per_vector for loop in visits)
        assert 50 < total <= MAX_INSTRUCTIONS[direction], kernel
        for loop in [*visits, loops["copies"]]:
            names = {opcode.split(".")[0] for opcode in checks.forbidden(loop)}
            allowed = ALLOWED.get((direction, KERNELS[kernel[1]], loop.name), set())
            assert not names & FORBIDDEN - allowed, (kernel, loop.name, names)
            assert not checks.narrow_accesses(loop), (kernel, loop.name)
            assert not checks.lane_strides(loop), (kernel, loop.name)
        for loop in visits:
            addresses = [opcode for opcode in checks.forbidden(loop) if checks.ADDRESS_ARITHMETIC.match(opcode)]
            assert not addresses, (kernel, loop.name, addresses)


@pytest.mark.parametrize("direction", MAX_INSTRUCTIONS)
def test_registers_leave_room_for_all_warps(direction: str) -> None:
    for loop, resources in _loops(direction):
        assert resources.registers <= MAX_REGISTERS, loop.kernel
        assert resources.spill_bytes == resources.stack_bytes == 0, loop.kernel


def test_forward_leaves_issue_slots() -> None:
    for loop_of in _by_kernel("forward").values():
        if loop_of["sums"].kernel.dtype == "float32":
            continue
        cycles = 0.0
        for name in ("sums", "write"):
            loop = loop_of[name]
            cycles += table.cycles_per_iteration(loop.instructions, 4, loop.dead, None) / (4 * loop.vectors)
        assert cycles < MAX_CYCLES, loop_of["sums"].kernel
