"""Compiles the CUDA kernels for the emulator and registers them as torch.ops.fastbn_emulator, backend "emulator".

With FASTBN_SANITIZE in the environment it is built with AddressSanitizer and UBSan (`nox -s sanitize`). The C++ tests
in tests/cpp run the same kernels under both in less time, on fewer cases.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
NEEDS_A_DEVICE = {"device_limits.cu"}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]


def _sources(folder: Path) -> list[str]:
    """Return the emulator, the bindings, and a C++ wrapper of each kernel file: torch would give a .cu to nvcc."""
    wrapped = []
    for kernel in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")):
        if kernel.name in NEEDS_A_DEVICE:
            continue
        wrapper = folder / f"{kernel.stem}_kernels.cpp"
        text = f'#include "{kernel.relative_to(ROOT / "csrc")}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        wrapped.append(wrapper)
    bindings = [ROOT / "csrc" / "bindings" / name for name in ("schemas.cpp", "arguments.cpp", "memory.cpp")]
    emulator = sorted((ROOT / "tests" / "emulator").glob("*.cpp"))
    return [str(path) for path in [*wrapped, *bindings, *emulator, ROOT / "tests" / "emulator" / "binding" / "ops.cpp"]]


@functools.cache
def load() -> ModuleType:
    """Build if anything changed, import, and register with fastbn. Returns the module, with set_seed."""
    from fastbn.backends import registry

    sanitizers = SANITIZERS if os.environ.get("FASTBN_SANITIZE") else []
    folder = ROOT / ".build" / ("emulator_sanitized" if sanitizers else "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    module = cpp_extension.load(
        name="fastbn_emulator",
        sources=_sources(folder),
        # This order makes cuda/device/device.cuh and cuda/device/runtime.h the emulator's.
        extra_include_paths=[str(ROOT / "tests" / "emulator"), str(ROOT / "csrc")],
        extra_cflags=[
            "-std=c++20",
            "-O1" if sanitizers else "-O2",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DFASTBN_NAMESPACE=fastbn_emulator",
            "-fvisibility=hidden",
            "-g0",
            *sanitizers,
        ],
        extra_ldflags=sanitizers,
        build_directory=str(folder),
    )
    registry.register(_emulated_backend())
    return module


def _emulated_backend():
    from fastbn import _C
    from fastbn.backends.native import CudaBackend
    from fastbn.ops import contract

    class EmulatedBackend(CudaBackend):
        """The CUDA kernels on CPU tensors, for whoever names it."""

        name = "emulator"
        ops = contract.bind("fastbn_emulator")
        device_types = ()

        def why_not(self, call):
            return None if call.input.is_cpu else f"the emulator takes no {call.input.device.type} tensors"

        def plan(self, call, direction, reason, limits=None):
            # The plan is that of a real device: the limits of the emulated one are whatever a test sets.
            return super().plan(call, direction, reason, limits or _C.named_device("h200"))

        def availability(self):
            return "yes: for tests"

    return EmulatedBackend()
