"""Builds three kinds of binaries with ninja: fastbn/libfastbn.so, which has the ops and serves every Python and every
torch from 2.10 on; fastbn/_C, a module for one version of Python; and fastbn/_node_*, for exactly one torch.

FASTBN_CUDA=0|1|auto   builds without CUDA, with CUDA, or (default) with CUDA if nvcc is found, GPU or not
TORCH_CUDA_ARCH_LIST   as in torch; default: those of sm_80, sm_90 and sm_100 that nvcc knows, and PTX of the last for
                       newer GPUs
MAX_JOBS               how many compilers run at once (default: ninja's, one or two more than there are cores)
FASTBN_PYTHONS         interpreters separated by os.pathsep: for each, _C is built too, and the node if it has torch
CXX, CXXFLAGS          the compiler, which may be "ccache g++", and flags that come last
"""

import glob
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

OLDEST_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
VERSION = re.search(r'"(.+)"', Path("fastbn/_version.py").read_text().rpartition("=")[2])[1]


def fail(message: str) -> None:
    sys.exit(f"fastbn: {message}")


try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    fail("building needs setuptools 77 or newer: pip install 'setuptools>=77'")
try:
    import pybind11
    from ninja import BIN_DIR, ninja_syntax
except ImportError as error:
    fail(f"building needs {error.name}: pip install {error.name}")

CXX = os.environ.get("CXX", "c++")
if shutil.which(CXX.split()[0]) is None:
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


def architecture_flags(architectures: str) -> list[str]:
    """Translate TORCH_CUDA_ARCH_LIST, as in "8.0;9.0+PTX", for nvcc."""
    flags = []
    for name in architectures.replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0 or 9.0+PTX, got '{name}'")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


ASK = """
import json, sys, sysconfig
about = {"tag": f"cp{sys.version_info[0]}{sys.version_info[1]}", "suffix": sysconfig.get_config_var("EXT_SUFFIX")}
about |= {"headers": sysconfig.get_path("include"), "torch": None, "error": None}
try:
    import torch
    from torch.utils import cpp_extension
    about |= {"torch": torch.__version__, "torch_headers": cpp_extension.include_paths()}
    about |= {"torch_libraries": cpp_extension.library_paths()}
except ImportError as error:
    about["error"] = str(error)
print(json.dumps(about))
"""


def describe(interpreter: str) -> dict:
    """Ask a Python for what extensions of its version, and of its torch, are built with."""
    return json.loads(subprocess.run([interpreter, "-c", ASK], check=True, stdout=subprocess.PIPE, text=True).stdout)


def sources(*patterns: str) -> list[str]:
    return sorted(path for pattern in patterns for path in glob.glob(pattern, recursive=True))


# Importing torch takes seconds, and pip runs this file several times, so only this process imports it.
THIS = describe(sys.executable)
if THIS["torch"] is None:
    remedy = "pip install torch, then pip install --no-build-isolation ."
    fail(f"building needs PyTorch 2.10 or newer, got none ({THIS['error']}): {remedy}")
if tuple(int(part) for part in THIS["torch"].split(".")[:2]) < OLDEST_TORCH:
    fail(f"building needs PyTorch 2.10 or newer, got {THIS['torch']}")
others = filter(None, os.environ.get("FASTBN_PYTHONS", "").split(os.pathsep))
PYTHONS = [THIS, *map(describe, others)]
CUDA = find_cuda()
architectures = (os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(CUDA)) if CUDA else ""

# Leaf loops for more than the baseline instruction set, which run only where dispatch.cpp detects support. g++ 12 warns
# about its own intrinsics header, with a warning that clang does not know.
avx512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
instruction_sets = {
    "csrc/cpu/kernels/kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
    "csrc/cpu/kernels/kernels_avx512.cpp": avx512,
    "csrc/cpu/kernels/kernels_avx512_bf16.cpp": f"{avx512} -mavx512bf16",
}
quiet = "-Wno-maybe-uninitialized -Wno-unknown-warning-option"
per_file = {path: f"{flags} {quiet}" for path, flags in instruction_sets.items()}
library_sources = sources("csrc/bindings/*.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/**/*.cu")
if not CUDA:
    library_sources = [path for path in library_sources if "cuda" not in path]
if platform.machine() not in ("x86_64", "AMD64"):
    library_sources = [path for path in library_sources if path not in instruction_sets]

common = [
    *("-std=c++20", "-g0", "-fPIC", "-fvisibility=hidden"),
    "-fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2",
    *(f'-DFASTBN_VERSION=\\"{VERSION}\\"', f'-DFASTBN_TORCH_VERSION=\\"{THIS["torch"]}\\"'),
    f"-DFASTBN_CUDA_ARCHITECTURES='\"{architectures}\"'",  # the shell sees semicolons
]
if CUDA:
    common += ["-DFASTBN_WITH_CUDA", f"-isystem {shlex.quote(CUDA)}/include"]
# A switch over an enum names every case, so that forgetting one that is added later is an error. g++ 12 warns of
# std::string (its bug 105651).
warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-restrict", "-Werror=switch"]
# Without these flags, compilers do not vectorise square roots, which may set errno, nor conditional arithmetic, which
# may raise floating-point exceptions.
vectorised = ["-fno-math-errno", "-fno-trapping-math"]
link_flags = ["-shared", "-Wl,-z,relro,-z,now,-z,noexecstack"]
if platform.system() != "Linux":
    link_flags = ["-shared", "-undefined dynamic_lookup"]


class Binary(Extension):
    """One file of the package, with flags of the compiler and the linker; `optional` as setuptools means it."""

    def __init__(self, filename: str, sources: list[str], flags: list[str], link_flags: list[str], optional=False):
        super().__init__("fastbn." + re.sub(r"\W", "_", filename), sources, optional=optional)
        self.filename, self.flags, self.link_flags = filename, " ".join(flags), " ".join(link_flags)


def headers(*packages: list[str]) -> list[str]:
    """Flags for the headers of packages, whose checks would put the paths of this machine into the binaries."""
    paths = [path for package in packages for path in package]
    outside = {path.partition("site-packages")[0] for path in paths}
    flags = [f"-isystem {shlex.quote(path)}" for path in paths]
    return flags + [f"-ffile-prefix-map={shlex.quote(path)}=" for path in sorted(outside)]


def library() -> Binary:
    """The ops. Of torch's libraries it links only the one with the stable ABI."""
    flags = [
        "-O3 -Icsrc -DTORCH_TARGET_VERSION=0x020a000000000000",
        *vectorised,
        *warnings,
        *headers(THIS["torch_headers"]),
    ]
    links = [*(f"-L{shlex.quote(path)}" for path in THIS["torch_libraries"]), "-ltorch_cpu"]
    if platform.system() == "Linux":
        links.append("-Wl,-z,defs")
    if CUDA:
        links += [f"-L{shlex.quote(CUDA)}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return Binary("libfastbn.so", library_sources, flags, links)


def module(python: dict) -> Binary:
    """fastbn._C for one version of Python, which links nothing of torch."""
    flags = ["-O2 -Icsrc", *warnings, *headers([python["headers"]], [pybind11.get_include()])]
    return Binary("_C" + python["suffix"], sources("csrc/python/*.cpp"), flags, ["-ldl"])


def node(python: dict) -> Binary:
    """The autograd node, which uses more of torch than its stable ABI and so serves the version that is in its name."""
    name = "_node_" + re.sub(r"\W", "_", python["torch"])
    # This order makes bindings/tensor.h that of csrc/node/aten.
    flags = ["-O2 -Icsrc/node/aten -Icsrc", *headers(python["torch_headers"], [python["headers"]])]
    flags += [f"-DTORCH_EXTENSION_NAME={name}"]
    links = [
        *(f"-L{shlex.quote(path)}" for path in python["torch_libraries"]),
        "-lc10",
        "-ltorch_cpu",
        "-ltorch_python",
    ]
    return Binary(name + python["suffix"], ["csrc/node/unit.cpp"], flags, links, optional=True)


modules = [module(python) for python in {python["suffix"]: python for python in PYTHONS}.values()]
nodes = [node(python) for python in PYTHONS if python["torch"]]
BINARIES = {binary.name: binary for binary in [*nodes, library(), *modules]}  # in the order in which they are begun


class BuildWithNinja(build_ext):
    """Writes the commands as a file for ninja, which runs them side by side and shows each file."""

    def get_ext_filename(self, name: str) -> str:
        *package, last = name.split(".")
        return os.path.join(*package, BINARIES[f"fastbn.{last}"].filename)

    def build_extensions(self) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        targets = {ext.name: os.path.abspath(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=120)
            writer.variable("builddir", str(folder))  # ninja's own notes
            self.write_rules(writer)
            for binary in self.extensions:
                self.write_binary(writer, folder / binary.name, binary, targets[binary.name])
        command = [os.path.join(BIN_DIR, "ninja"), "-f", str(folder / "build.ninja"), "-k", "0"]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        for target in targets.values():  # what fails is missing, not old
            Path(target).unlink(missing_ok=True)
        subprocess.run(command, env=os.environ | {"NINJA_STATUS": "[%f/%t, %e s] "})
        missing = [binary for binary in self.extensions if not os.path.exists(targets[binary.name])]
        if not all(binary.optional for binary in missing):
            raise CompileError("fastbn: the compiler's messages are above")
        for binary in missing:
            self.warn(f"fastbn works without {binary.filename}, with more time per call")

    def write_rules(self, writer: ninja_syntax.Writer) -> None:
        last = os.environ.get("CXXFLAGS", "")
        writer.rule(
            "compile",
            f"{CXX} {' '.join(common)} $flags {last} -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="$in",
        )
        if CUDA:
            host = "-Xcompiler=-fPIC,-fvisibility=hidden,-fstack-protector-strong"
            flags = ["-std=c++20 -O3 -Icsrc", host, *architecture_flags(architectures)]
            launcher, compiler = ("ccache ", CXX.split()[1]) if CXX.split()[0] == "ccache" else ("", CXX.split()[0])
            nvcc = f"{launcher}{shlex.quote(CUDA)}/bin/nvcc -ccbin {compiler} {' '.join(flags)}"
            writer.rule(
                "nvcc",
                f"{nvcc} -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description=f"$in ({architectures})",
            )
        writer.rule("link", f"{CXX} {' '.join(link_flags)} $in $flags -o $out", description="$out")

    def write_binary(self, writer: ninja_syntax.Writer, folder: Path, binary: Binary, target: str) -> None:
        objects = []
        # The files that take longest come first.
        for source in sorted(binary.sources, key=lambda path: ("/kernels_" not in path, not path.endswith(".cu"))):
            built = str(folder / Path(source).with_suffix(".o").name)
            rule = "nvcc" if source.endswith(".cu") else "compile"
            flags = f"{binary.flags} {per_file.get(source, '')}"
            objects += writer.build(built, rule, source, variables={"flags": flags} if rule == "compile" else {})
        writer.build(target, "link", objects, variables={"flags": binary.link_flags})


class TaggedWheel(bdist_wheel):
    """A wheel for every Python that it has a module for."""

    def get_tag(self) -> tuple[str, str, str]:
        tags = ".".join(sorted({python["tag"] for python in PYTHONS}))
        return tags, tags, super().get_tag()[2]


setup(ext_modules=list(BINARIES.values()), cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": TaggedWheel})
