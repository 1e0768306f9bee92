"""What may include or import what: the arrows of docs/design.md, by reading the tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())

# A layer of csrc: the layers that its files may include.
MAY_INCLUDE = {
    "math": {"math"},
    "cpu": {"math", "cpu"},
    "cuda": {"math", "cuda"},
    "bindings": {"math", "cpu", "cuda", "bindings"},
}
# What no other file than these may include.
ONLY_IN = {
    "cuda_runtime_api.h": {"cuda/runtime.h"},
    "cooperative_groups.h": {"cuda/device.cuh"},
    "immintrin.h": {"cpu/vec.h"},
    "thread": set(),
    "omp.h": set(),
}
DEVICE_LANGUAGE = re.compile(
    r"threadIdx|blockIdx|blockDim|gridDim|__shared__|__syncthreads|__syncwarp|__shfl|__ballot|__ldg|__global__|"
    r"<<<|cooperative_groups|\batomic[A-Z]\w*|cudaLaunch|\basm\b|__nv_bfloat|__half\b"
)

# A module of fastbn: what of fastbn it may import. The command line may import everything.
MAY_IMPORT = {
    "_activations": set(),
    "_formulas": {"_activations"},
    "reference": {"_activations", "_formulas"},
    "_ops": {"_activations", "_formulas", "reference", "_C"},
    "_errors": set(),
    "autograd": {"_activations", "_errors", "_formulas", "_ops"},
    "functional": {"_activations", "_formulas", "_ops", "autograd"},
    "modules": {"_activations", "functional"},
    "convert": {"modules"},
    "_explain": {"_activations", "_formulas", "_ops", "_C"},
    "_info": {"_C"},
    "_max_sms": {"_C"},
}


def _relative(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def _code(path: Path) -> str:
    """Without comments, which may speak of what the code must not use."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', _code(path), re.MULTILINE)


def test_the_tree_is_where_these_tests_look():
    assert {path.parent.name for path in SOURCES} == set(MAY_INCLUDE)
    assert {path.stem for path in (ROOT / "fastbn").glob("*.py")} - {"__init__", "__main__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_includes(path):
    layer = path.parent.name
    for include in _includes(path):
        first = include.split("/")[0]
        if "/" in include and first in MAY_INCLUDE:
            assert (CSRC / include).exists(), f"{include} does not exist"
            assert first in MAY_INCLUDE[layer], f"{layer} may not include {include}"
        assert layer == "bindings" or first not in ("torch", "ATen", "c10", "pybind11"), f"{layer} includes {include}"
        assert layer == "cuda" or not re.match("cu(da|rand|blas)", include) or first in MAY_INCLUDE, include
        if include in ONLY_IN:
            assert _relative(path) in ONLY_IN[include], f"only {ONLY_IN[include]} may include {include}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "cuda"], ids=_relative)
def test_kernels_touch_cuda_only_through_the_device_header(path):
    if path.name != "device.cuh":
        assert not DEVICE_LANGUAGE.findall(_code(path))


def test_device_code_and_its_emulation_have_the_same_headers():
    emulated = {path.name for path in (ROOT / "tests" / "emulator" / "cuda").iterdir()}
    assert emulated == {"device.cuh", "runtime.h"}


def test_bindings_hold_no_arithmetic():
    for path in SOURCES:
        if path.parent.name == "bindings":
            assert not re.search(r"\b(sqrt|exp|erf|tanh|fma)\w*\s*\(", _code(path)), path.name


def _imports(path: Path) -> set[str]:
    """Modules of fastbn that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            if node.module == "fastbn":
                found |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("fastbn."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[-1] for parts in names if parts[0] == "fastbn"}
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports(name):
    assert _imports(ROOT / "fastbn" / f"{name}.py") <= MAY_IMPORT[name]


def test_the_benchmark_takes_of_the_tests_only_cases_and_tolerances():
    for path in (ROOT / "bench").glob("*.py"):
        taken = re.findall(r"^\s*(?:from|import) tests\b(.*)", path.read_text(), re.MULTILINE)
        assert all(re.match(r"\.(cases|tolerance) import| import tolerance$", what) for what in taken), path.name


def test_the_package_imports_neither_its_command_line_nor_the_tests():
    assert "cli" not in _imports(ROOT / "fastbn" / "__init__.py")
    for path in (ROOT / "fastbn").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (tests|bench)\b", path.read_text(), re.MULTILINE), path.name
