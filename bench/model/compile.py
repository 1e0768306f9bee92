"""Compiles a kernel source to a cubin with line information, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ARCH = "90"

_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_\d+a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel: registers per thread, and bytes of stack and spills."""

    registers: int
    stack_bytes: int
    spill_bytes: int


def resources_of(report: str) -> dict[str, Resources]:
    """Return the resources of the kernels in the output of `ptxas -v`, by mangled name."""
    return {
        match["name"]: Resources(
            int(match["registers"]), int(match["stack"]), int(match["stores"]) + int(match["loads"])
        )
        for match in _PTXAS.finditer(report)
    }


def compile_cubin(source: Path, include: Path, output: Path, arch: str = ARCH) -> dict[str, Resources]:
    """Write the cubin of a source, and return the resources of its kernels.

    Raises FileNotFoundError where there is no nvcc, and CalledProcessError, with nvcc's words, if it fails.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc: expected on PATH")
    command = [nvcc, "-cubin", "-std=c++20", "-O3", "-lineinfo", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command += [f"-I{include}", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
    return resources_of(result.stderr)
