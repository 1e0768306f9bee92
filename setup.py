"""Builds fastbn._C with torch's cpp_extension.

FASTBN_CUDA=0|1|auto   without, with, or (default) with CUDA exactly where nvcc is found; never by whether a GPU is here
TORCH_CUDA_ARCH_LIST   as torch reads it; without it sm_80, sm_90 and sm_100, and PTX for what comes later
"""

import glob
import os
import shutil
import sys

from setuptools import setup

OLDEST_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def fail(message: str) -> None:
    sys.exit(f"fastbn: {message}")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail("building needs PyTorch 2.10 or newer: pip install torch, then pip install --no-build-isolation .")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    fail(f"building needs PyTorch 2.10 or newer, got {torch.__version__}")
try:
    import pybind11
except ImportError:
    fail("building needs pybind11: pip install pybind11")

if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
    fail("building needs a C++20 compiler, got none: install g++ 11 or clang 14 or newer, or set CXX")


def with_cuda() -> bool:
    wanted = os.environ.get("FASTBN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        fail(f"FASTBN_CUDA: expected 0, 1 or auto, got '{wanted}'")
    home = cpp_extension.CUDA_HOME
    found = home is not None and os.path.exists(os.path.join(home, "bin", "nvcc"))
    if wanted == "1" and not found:
        fail("FASTBN_CUDA=1 needs nvcc, got none: install the CUDA toolkit, or set CUDA_HOME")
    return found and wanted != "0"


def sources(*patterns: str) -> list[str]:
    return sorted(path for pattern in patterns for path in glob.glob(pattern))


CUDA = with_cuda()
if CUDA:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if CUDA else ""

macros = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ("FASTBN_TORCH_VERSION", f'"{torch.__version__}"'),
    ("FASTBN_CUDA_ARCHITECTURES", f'"{architectures}"'),
]
host_flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
common = {
    "name": "fastbn._C",
    "include_dirs": [os.path.abspath("csrc"), pybind11.get_include()],
    "define_macros": macros,
}
cpu_sources = sources("csrc/bindings/*.cpp", "csrc/cpu/*.cpp")
if CUDA:
    extension = cpp_extension.CUDAExtension(
        sources=cpu_sources + sources("csrc/cuda/*.cu"),
        extra_compile_args={"cxx": host_flags, "nvcc": ["-std=c++20", "-O3", "-lineinfo"]},
        **common,
    )
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
else:
    extension = cpp_extension.CppExtension(
        sources=[path for path in cpu_sources if not path.endswith("/cuda.cpp")],
        extra_compile_args={"cxx": host_flags},
        **common,
    )

# One binary for every torch from 2.10 on, with CUDA or without: of torch only what holds the stable ABI.
extension.libraries = [
    name for name in extension.libraries if name not in ("cudart", "c10_cuda", "torch_cuda", "torch_python", "torch")
]

setup(ext_modules=[extension], cmdclass={"build_ext": cpp_extension.BuildExtension})
