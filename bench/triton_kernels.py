"""What Triton's compiler makes of the Triton kernels, for GPUs that need not be here: `python -m bench.triton_kernels`.

Prints a table of registers, spills, shared memory, the width of memory accesses and the seconds of compiling (with an
empty TRITON_CACHE_DIR), or with --json a list of objects. Nothing is known of the time that a kernel takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbn.backends.triton import grad_sums, input_grad, moments, normalize, plans, resident

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ELEMENTS = ("input", "residual", "output", "grad_out", "grad_input", "grad_residual")
_VECTORS = ("weight", "bias", "running_mean", "running_var", "grad_weight", "grad_bias")
_FLOAT64 = ("mean", "inv_std", "var", "sum_grad", "sum_grad_xhat", "count", "partials")
_NUMBERS = ("momentum", "eps", "param")


@dataclass(frozen=True)
class Case:
    """A kernel on a tensor. `absent` are the arguments that are None."""

    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    activation: str = "none"
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        layout = "rows" if self.channels_last else "contiguous"
        shape = "x".join(map(str, self.shape))
        return f"{self.kernel} {shape} {layout} {_TYPES[self.dtype]} {self.activation}"


@dataclass(frozen=True)
class Compiled:
    """What was compiled: registers per thread, bytes spilled and shared, and the number of accesses by their bytes.

    `seconds` is what compiling took, where Triton's cache did not have it.
    """

    case: str
    target: str
    warps: int
    elements: int
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    seconds: float


def kernel_of(case: Case) -> Any:
    """Return the kernel that a case names."""
    for module in (moments, normalize, grad_sums, input_grad, resident):
        if hasattr(module, f"{case.kernel}_kernel"):
            return getattr(module, f"{case.kernel}_kernel")
    raise ValueError(f"kernel: got {case.kernel!r}")


def blocks_of(case: Case) -> plans.Blocks:
    """Return the plan of a case."""
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    layout, limits = plans.layout_of(case.shape, memory_format), plans.Limits()
    if case.kernel.startswith("resident"):
        blocks = plans.resident(layout, case.dtype, 2 if "backward" in case.kernel else 1, limits)
        assert blocks is not None, f"{case} is not resident"
        return blocks
    return plans.split(layout, case.dtype, limits)


def _source(case: Case) -> tuple[ASTSource, plans.Blocks]:
    kernel, blocks = kernel_of(case), blocks_of(case)
    constants: dict[str, Any] = {
        "TILE": blocks.tile,
        "ACTIVATION": case.activation,
        "IS_CUMULATIVE": False,
        "IS_FROZEN": False,
        "CHANNELS": plans.FINISH_CHANNELS,
        "SPLITS": plans.FINISH_SPLITS,
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in case.absent:
            signature[name] = "constexpr"
            continue
        if name in _NUMBERS:
            signature[name] = "fp64"
            continue
        if name in _ELEMENTS:
            signature[name] = f"*{_TYPES[case.dtype]}"
        elif name in _VECTORS:
            signature[name] = "*fp64" if case.dtype == torch.float64 else "*fp32"
        elif name in _FLOAT64:
            signature[name] = "*fp64"
        elif name in ("mask", "counter"):
            signature[name] = {"mask": "*u8", "counter": "*i64"}[name]
        else:
            signature[name] = "i64" if blocks.tile.is_int64 else "i32"
            continue
        attributes[i,] = [["tt.divisibility", 16]]
    given = {name: constants.get(name) for name in kernel.arg_names if signature[name] == "constexpr"}
    return ASTSource(kernel, signature, given, attributes), blocks


def compile_case(case: Case, target: str) -> Compiled:
    """Compile a case, which takes a second or two, and read the result."""
    source, blocks = _source(case)
    warps = blocks.warps if "finish" not in case.kernel else 4
    begin = time.perf_counter()
    result = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "enable_fp_fusion": True})
    seconds = time.perf_counter() - begin
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, loads, stores = read(result.asm)
    shared = result.metadata.shared
    return Compiled(str(case), target, warps, blocks.tile.elements, registers, spilled, shared, loads, stores, seconds)


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, dict[int, int], dict[int, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    return registers, stack, *(_accesses(kind, asm["ptx"]) for kind in ("ld", "st"))


def _accesses(kind: str, ptx: str) -> dict[int, int]:
    """Count the accesses to global memory in PTX by their bytes."""
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.v(\d))?\.[a-z](\d+)", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    return dict(sorted(widths.items()))


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, dict[int, int], dict[int, int]]:
    text = asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
    spilled = sum(int(n) for n in re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    bytes_of = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
    found = []
    for kind in ("load", "store"):
        names = re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+?)(?:_d16\w*)?\s", text)
        found.append(dict(sorted(Counter(bytes_of.get(name, 0) for name in names).items())))
    return registers, spilled, *found


_ALIGNED, _ODD, _SMALL = (64, 64, 56, 56), (64, 64, 55, 57), (32, 256, 14, 14)
_FORWARD = ("running_mean", "running_var")  # normalised by the batch's own


def cases() -> Iterator[Case]:
    """Yield the cases of the table: each kernel, layout and dtype, with relu, and the heavier epilogues once."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (False, True):
            yield Case("moments", _ALIGNED, dtype, rows)
            yield Case("normalize", _ALIGNED, dtype, rows, "relu", ("residual", "mask", *_FORWARD))
            yield Case("normalize", _ALIGNED, dtype, rows, "relu", _FORWARD)
            yield Case("grad_sums", _ALIGNED, dtype, rows, "relu", ("residual", "mask"))
            yield Case("grad_sums", _ALIGNED, dtype, rows, "relu", ("residual",))
            yield Case("input_grad", _ALIGNED, dtype, rows, "relu", ("residual", "mask", "grad_residual", "count"))
            yield Case("input_grad", _ALIGNED, dtype, rows, "relu", ("residual", "count"))
            small = _SMALL if not rows else (4, 256, 8, 8)
            yield Case("resident_forward", small, dtype, rows, "relu", ("residual", "mask"))
            yield Case("resident_forward", small, dtype, rows, "relu")
            small = (16, 256, 16, 16) if not rows else (2, 256, 8, 8)
            yield Case("resident_backward", small, dtype, rows, "relu", ("residual", "mask", "grad_residual"))
            yield Case("resident_backward", small, dtype, rows, "relu", ("residual",))
    yield Case("resident_forward", (64, 8, 16, 16), torch.bfloat16, False, "relu", ("residual", "mask"))
    yield Case("resident_backward", (32, 8, 16, 16), torch.bfloat16, False, "gelu", ("mask",))
    yield Case("moments", _ODD, torch.bfloat16, False)
    yield Case("normalize", _ODD, torch.bfloat16, False, "gelu", ("mask", *_FORWARD))
    yield Case("input_grad", _ALIGNED, torch.float32, True, "mish", ("mask", "count"))
    yield Case("normalize", _ALIGNED, torch.float64, False, "silu", ("residual", "mask", *_FORWARD))
    yield Case("moments", _ALIGNED, torch.float64, True)
    yield Case("finish_moments", _ALIGNED, torch.bfloat16, False)
    yield Case("finish_grad_sums", _ALIGNED, torch.bfloat16, False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_kernels", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="for which GPU (default: all)")
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.match in str(case)]
    results = [compile_case(case, target) for target in options.target or TARGETS for case in chosen]
    if options.json:
        json.dump([dataclasses.asdict(result) for result in results], sys.stdout)
        return 0
    for r in results:
        loads, stores = (" ".join(f"{n}x{size}" for size, n in widths.items()) for widths in (r.loads, r.stores))
        print(
            f"{r.target:7} {r.case:60} {r.elements:6} elements {r.warps:2} warps {r.registers:4} registers "
            f"{r.spilled:4} spilled {r.shared:6} shared; loads {loads}; stores {stores}; {r.seconds:.2f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
