"""Builds fastbn._C, and fastbn._node_* for the installed torch, with torch's cpp_extension.

FASTBN_CUDA=0|1|auto   builds without CUDA, with CUDA, or (default) with CUDA if nvcc is found, GPU or not
TORCH_CUDA_ARCH_LIST   as in torch; default: those of sm_80, sm_90 and sm_100 that nvcc knows, and PTX of the last for
                       newer GPUs
"""

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

OLDEST_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")


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


def find_cuda() -> str | None:
    """Return the folder of the CUDA toolkit, or None for a build without CUDA.

    torch's own search finds no toolkit if torch was built without CUDA.
    """
    wanted = os.environ.get("FASTBN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        fail(f"FASTBN_CUDA: expected 0, 1 or auto, got '{wanted}'")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        fail("FASTBN_CUDA=1 needs nvcc, got none: install the CUDA toolkit, or set CUDA_HOME")
    if wanted == "0" or nvcc is None:
        return None
    # nvcc on PATH may be a link or a script, but nvcc knows where its toolkit is.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return os.path.realpath(top[1]) if top else str(Path(nvcc).resolve().parents[1])


def default_architectures(cuda: str) -> str:
    nvcc = [os.path.join(cuda, "bin", "nvcc"), "--list-gpu-arch"]
    known = subprocess.run(nvcc, check=True, capture_output=True, text=True).stdout.split()
    chosen = [arch for arch in DEFAULT_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    return ";".join(chosen) + "+PTX"


def sources(*patterns: str) -> list[str]:
    return sorted(path for pattern in patterns for path in glob.glob(pattern, recursive=True))


CUDA = find_cuda()
if CUDA:
    cpp_extension.CUDA_HOME = CUDA
    # The extension takes nothing of CUDA from torch, so torch's CUDA version and nvcc's need not match.
    cpp_extension._check_cuda_version = lambda *args: None
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(CUDA)
architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if CUDA else ""

macros = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ("FASTBN_TORCH_VERSION", f'"{torch.__version__}"'),
    ("FASTBN_CUDA_ARCHITECTURES", f'"{architectures}"'),
]
if CUDA:
    macros.append(("FASTBN_WITH_CUDA", None))
host_flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# A switch over an enum names every case, so that forgetting one that is added later is an error.
host_flags += ["-Werror=switch"]
# Without these flags, compilers do not vectorise square roots, which may set errno, nor conditional arithmetic, which
# may raise floating-point exceptions.
host_flags += ["-fno-math-errno", "-fno-trapping-math"]
common = {
    "name": "fastbn._C",
    "include_dirs": [os.path.abspath("csrc"), pybind11.get_include()],
    "define_macros": macros,
}
# Leaf loops for more than the baseline instruction set, which run only where dispatch.cpp detects support.
avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
instruction_sets = {
    "csrc/cpu/kernels/kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/kernels/kernels_avx512.cpp": avx512,
    "csrc/cpu/kernels/kernels_avx512_bf16.cpp": [*avx512, "-mavx512bf16"],
}
cpu_sources = [path for path in sources("csrc/bindings/*.cpp", "csrc/cpu/**/*.cpp") if path not in instruction_sets]
if platform.machine() not in ("x86_64", "AMD64"):
    instruction_sets = {}


class BuildExtension(cpp_extension.BuildExtension):
    """torch's BuildExtension, which first compiles the files with their own flags: torch's ninja file has one set."""

    def build_extensions(self) -> None:
        with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            self.extensions[0].extra_objects += pool.map(self.compile_leaf_loops, instruction_sets)
        super().build_extensions()

    def build_extension(self, extension):
        """Build an extension; that of the node, which fastbn works without, may fail."""
        try:
            super().build_extension(extension)
        except Exception as error:
            if not extension.optional:
                raise
            # distutils warns of this one where an extension is optional.
            raise CompileError(f"fastbn works without it, with more time per call: {error}") from error

    def compile_leaf_loops(self, source: str) -> str:
        target = Path(self.build_temp).resolve() / Path(source).with_suffix(".o").name
        target.parent.mkdir(parents=True, exist_ok=True)
        inputs = [Path(source), *map(Path, sources("csrc/cpu/**/*.h", "csrc/cpu/**/*.inl", "csrc/math/*.h"))]
        if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
            compiler = os.environ.get("CXX", "c++").split()
            # g++ 12 warns about its own intrinsics header, with a warning that clang does not know.
            quiet = ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
            flags = [*host_flags, *instruction_sets[source], *quiet, "-fPIC", "-Icsrc"]
            subprocess.run([*compiler, *flags, "-c", source, "-o", str(target)], check=True)
        return str(target)


if CUDA:
    extension = cpp_extension.CUDAExtension(
        sources=cpu_sources + sources("csrc/cuda/**/*.cu"),
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

# One binary serves every torch from 2.10 on, with or without CUDA: of torch's libraries it links only the one with the
# stable ABI.
extension.libraries = [
    name for name in extension.libraries if name not in ("cudart", "c10_cuda", "torch_cuda", "torch_python", "torch")
]

# The autograd node uses more of torch than its stable ABI, so it serves one version of it, which is in its name.
node = cpp_extension.CppExtension(
    name="fastbn._node_" + re.sub(r"\W", "_", torch.__version__),
    sources=sources("csrc/node/*.cpp"),
    depends=sources("csrc/node/**/*.h", "csrc/bindings/*", "csrc/math/*.h"),
    # This order makes bindings/tensor.h that of csrc/node/aten.
    include_dirs=[os.path.abspath("csrc/node/aten"), os.path.abspath("csrc")],
    extra_compile_args={"cxx": ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"]},
    optional=True,
)

setup(ext_modules=[extension, node], cmdclass={"build_ext": BuildExtension})
