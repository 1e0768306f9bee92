"""The arrows of docs/design.md, checked by reading the tree: which file may include or import which."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())

# For each folder of csrc, lower ones first, the folders whose files its own may include.
MAY_INCLUDE = {
    "math": {"math"},
    "plan": {"math", "plan"},
    "cpu/simd": {"math", "cpu/simd"},
    "cpu/kernels": {"math", "cpu/simd", "cpu/kernels"},
    "cpu": {"math", "cpu/kernels", "cpu"},
    "cuda/device": {"math", "cuda/device"},
    "cuda/block": {"math", "plan", "cuda/device", "cuda/block"},
    "cuda/element": {"math", "plan", "cuda/device", "cuda/block", "cuda/element"},
    "cuda/kernels": {"math", "plan", "cuda/device", "cuda/block", "cuda/element", "cuda/kernels"},
    "cuda": {"math", "plan", "cuda/device", "cuda/block", "cuda/element", "cuda/kernels", "cuda"},
    "bindings": {"math", "plan", "cpu/kernels", "cpu", "cuda/device", "cuda", "bindings"},
    "python": {"math", "plan", "bindings", "python"},
    "node/aten/bindings": set(),
    "node": {"math", "bindings", "node"},
}
# The headers of a folder that others may include, where that is not all of them.
OPEN = {
    "bindings": {
        f"bindings/{name}" for name in ("arguments.cpp", "launchers.h", "library.h", "memory.h", "ops.h", "tensor.h")
    },
    "cpu/kernels": {"cpu/kernels/kernels.h"},
    "cuda/device": {"cuda/device/device.cuh", "cuda/device/runtime.h"},
}
# Headers that only these files may include.
ONLY_IN = {
    "cuda_runtime_api.h": {"cuda/device/runtime.h"},
    "cooperative_groups.h": {"cuda/device/device.cuh"},
    "immintrin.h": {"cpu/simd/vec.h"},
    "thread": set(),
    "omp.h": set(),
}
DEVICE_LANGUAGE = re.compile(
    r"threadIdx|blockIdx|blockDim|gridDim|__shared__|__syncthreads|__syncwarp|__shfl|__ballot|__ldg|__global__|"
    r"<<<|cooperative_groups|\batomic[A-Z]\w*|cudaLaunch|\basm\b|__nv_bfloat|__half\b"
)

# For each layer of fastbn, lower ones first, the layers that its modules may import beside their own.
MAY_IMPORT = {
    "_check": set(),
    "_torch": set(),
    "_version": set(),
    "ops": {"_C", "_torch"},
    "backends": {"_C", "_torch", "_version", "ops"},
    "autograd": {"_torch", "backends", "ops"},
    "functional": {"autograd", "backends", "ops"},
    "nn": {"_torch", "autograd", "functional", "ops"},
    "transforms": {"_torch", "backends", "functional", "nn", "ops"},
    "inspect": {"_C", "_torch", "_version", "backends", "nn", "ops", "transforms"},
    "__init__": {"_check", "_version", "functional", "nn", "transforms", "inspect", "ops"},
    "testing": {"functional", "nn", "backends", "ops"},
    "measure": {"__init__", "_torch", "backends", "ops", "testing"},
    "cli": {"__init__", "_version", "inspect", "measure", "testing"},
    "__main__": {"cli"},
}
# The order within a layer that has one.
WITHIN = {
    "ops": ("activations", "layout", "errors", "contract", "dispatch"),
    "backends": ("reference", "aten", "native", "triton", "node", "crossings", "registry"),
    "autograd": ("composite", "batch_norm", "from_output", "statistics", "moments", "inverse_sqrt", "whitening"),
    "nn": (
        *("scripting", "torch_activations", "activation", "epilogue", "saving", "running"),
        *("batchnorm", "folded", "frozen", "ghost", "lazy", "renorm", "masked", "accumulated"),
        *("sync", "whitening"),
    ),
    "transforms": (
        *("module", "compile_pass", "checkpoint", "fuse", "registry", "report", "sync", "convert", "freeze"),
        *("calls", "pairs", "fold", "tools", "accumulate", "population", "conventions"),
    ),
    "inspect": ("model", "explain", "doctor", "info", "limits"),
    "testing": ("cases", "tolerance", "extended", "compare", "parity", "fixtures"),
    "measure": (
        *("timer", "operations", "workload", "inputs", "implementations", "gate", "copies", "machine", "one_shape"),
    ),
}


def _relative(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def _code(path: Path) -> str:
    """Return the source without comments, which may name what the code must not use."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', _code(path), re.MULTILINE)


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _forbidden_includes(file: str, includes: list[str]) -> list[str]:
    """Return the includes that a file of csrc may not have."""
    folder, wrong = _folder(file), []
    for include in includes:
        other = _folder(include)
        if other in MAY_INCLUDE:
            allowed = other in MAY_INCLUDE[folder] and (other == folder or include in OPEN.get(other, {include}))
        elif include.split("/")[0] in ("torch", "ATen", "c10"):
            allowed = folder in ("bindings", "node", "node/aten/bindings")
        elif include.split("/")[0] == "pybind11" or include == "Python.h":
            allowed = folder in ("python", "node")
        else:
            allowed = file in ONLY_IN[include] if include in ONLY_IN else not re.match("cu(da|rand|blas)", include)
        if not allowed:
            wrong.append(include)
    return wrong


def test_the_tree_is_where_these_tests_look():
    assert {_folder(_relative(path)) for path in SOURCES} == set(MAY_INCLUDE)
    assert {_layer(path) for path in PACKAGE} == set(MAY_IMPORT)
    for layer, order in WITHIN.items():
        parts = {path.relative_to(ROOT / "fastbn" / layer).parts[0].removesuffix(".py") for path in _files_of(layer)}
        assert parts - {"__init__"} == set(order)


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_includes(path):
    includes = _includes(path)
    assert not _forbidden_includes(_relative(path), includes)
    for include in includes:
        assert _folder(include) not in MAY_INCLUDE or (CSRC / include).exists(), f"{include} does not exist"


@pytest.mark.parametrize(
    "file, planted",
    [
        ("math/layout.h", "cpu/partition.h"),
        ("math/layout.h", "plan/plan.h"),
        ("plan/cost.h", "cuda/launch.h"),
        ("plan/shared_memory.h", "cuda_runtime_api.h"),
        ("plan/planner.h", "torch/csrc/stable/tensor.h"),
        ("cpu/forward.cpp", "plan/plan.h"),
        ("cpu/simd/vec.h", "cpu/kernels/loops.h"),
        ("cpu/kernels/loops.h", "cpu/partition.h"),
        ("cpu/forward.cpp", "cpu/simd/vec.h"),
        ("cpu/forward.cpp", "cpu/kernels/sums.h"),
        ("cpu/forward.cpp", "torch/csrc/stable/tensor.h"),
        ("cpu/kernels/loops.h", "immintrin.h"),
        ("cuda/device/device.cuh", "cuda/block/walk.cuh"),
        ("cuda/block/reduce.cuh", "cuda/element/grad_z.cuh"),
        ("cuda/element/grad_z.cuh", "cuda/kernels/passes.cuh"),
        ("cuda/kernels/moments.cu", "cuda/launch.h"),
        ("cuda/kernels/moments.cu", "cuda_runtime_api.h"),
        ("cuda/launch.cu", "bindings/stable.h"),
        ("bindings/ops.h", "cuda/kernels/passes.cuh"),
        ("bindings/ops.h", "node/ops.h"),
        ("bindings/memory.cpp", "pybind11/pybind11.h"),
        ("bindings/library.cpp", "python/allocate.h"),
        ("python/module.cpp", "torch/csrc/stable/tensor.h"),
        ("python/module.cpp", "bindings/stable.h"),
        ("node/ops.cpp", "bindings/stable.h"),
        ("node/ops.cpp", "cpu/launch.h"),
    ],
    ids=str,
)
def test_an_upward_include_is_found(file, planted):
    assert (CSRC / file).exists()
    assert _forbidden_includes(file, [*_includes(CSRC / file), planted]) == [planted]


@pytest.mark.parametrize("path", [p for p in SOURCES if _relative(p).startswith("cuda/")], ids=_relative)
def test_kernels_touch_cuda_only_through_the_device_header(path):
    if path.name != "device.cuh":
        assert not DEVICE_LANGUAGE.findall(_code(path))


DEVICE = CSRC / "cuda" / "device"


def test_device_code_and_its_emulation_have_the_same_headers():
    emulated = {path.name for path in (ROOT / "tests" / "emulator" / "cuda" / "device").iterdir()}
    assert emulated == {"device.cuh", "runtime.h"}


def test_every_device_primitive_has_a_kernel():
    """A primitive that only its emulation and tests use is one more thing to emulate."""
    public = re.sub(
        r"namespace detail \{.*?\}  // namespace detail", "", (DEVICE / "device.cuh").read_text(), flags=re.DOTALL
    )
    primitives = set(re.findall(r"^FASTBN_DEVICE [^(;]*?(\w+)\(", public, re.MULTILINE))
    assert {"sync_block", "shuffle_xor", "copy_async16", "load16"} <= primitives
    kernels = "".join(_code(path) for path in SOURCES if _relative(path).startswith("cuda/") and path.parent != DEVICE)
    assert {name for name in primitives if f"device::{name}" not in kernels} == set()


def test_bindings_hold_no_arithmetic():
    for path in SOURCES:
        if path.parent.name == "bindings":
            assert not re.search(r"\b(sqrt|exp|erf|tanh|fma)\w*\s*\(", _code(path)), path.name


PACKAGE = sorted((ROOT / "fastbn").rglob("*.py"))


def _layer(path: Path) -> str:
    return path.relative_to(ROOT / "fastbn").parts[0].removesuffix(".py")


def _files_of(layer: str) -> list[Path]:
    return [path for path in PACKAGE if _layer(path) == layer]


def _imports(source: str) -> set[tuple[str, ...]]:
    """Return the imports from fastbn by their parts: ("ops", "layout"); ("__init__",) for names of the package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "fastbn":
                is_layer = parts and (parts[0] in MAY_IMPORT or parts[0] == "_C")
                found.add(tuple(parts) if is_layer else ("__init__",))
    return found


def _upward(path: Path, source: str) -> list[str]:
    """Return the imports of a file that its level does not allow."""
    layer, wrong = _layer(path), []
    parts = path.relative_to(ROOT / "fastbn").parts
    module = parts[min(1, len(parts) - 1)].removesuffix(".py")
    order = WITHIN.get(layer, ())
    for imported in _imports(source):
        if imported[0] != layer:
            allowed = imported[0] in MAY_IMPORT[layer]
        elif len(imported) > 1 and imported[1] in order and module in order:
            allowed = order.index(imported[1]) <= order.index(module)
        else:
            allowed = True
        if not allowed:
            wrong.append(".".join(imported))
    return wrong


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports(path):
    assert not _upward(path, path.read_text())


@pytest.mark.parametrize(
    "file, planted",
    [
        ("ops/layout.py", "from fastbn.ops import contract"),
        ("ops/dispatch.py", "from fastbn.backends import registry"),
        ("backends/reference/formulas.py", "from fastbn.backends.registry import get"),
        ("backends/native.py", "from fastbn.backends import registry"),
        ("backends/registry.py", "from fastbn.autograd import batch_norm"),
        ("autograd/composite.py", "from fastbn.autograd.batch_norm import BatchNormFunction"),
        ("autograd/batch_norm.py", "from fastbn.autograd import statistics"),
        ("autograd/batch_norm.py", "import fastbn.functional"),
        ("functional.py", "from fastbn.nn import BatchNorm2d"),
        ("nn/batchnorm.py", "from fastbn import convert"),
        ("nn/batchnorm.py", "from fastbn.nn.frozen import FrozenBatchNorm2d"),
        ("nn/epilogue.py", "from fastbn.nn.batchnorm import BatchNorm2d"),
        ("transforms/fuse/trace.py", "from fastbn.transforms.registry import register"),
        ("transforms/convert.py", "from fastbn.inspect.explain import explain"),
        ("transforms/checkpoint.py", "from fastbn.transforms.fold import fold"),
        ("inspect/explain.py", "from fastbn import functional"),
        ("__init__.py", "from fastbn.testing import cases"),
        ("testing/cases.py", "from fastbn.testing.tolerance import ulp"),
        ("testing/compare.py", "from fastbn.cli.text import table"),
        ("measure/timer.py", "from fastbn.measure.operations import Operation"),
        ("measure/gate.py", "from fastbn.cli.text import table"),
        ("cli/verify.py", "from fastbn.functional import batch_norm"),
    ],
    ids=str,
)
def test_an_upward_import_is_found(file, planted):
    path = ROOT / "fastbn" / file
    assert path.exists() and _upward(path, f"{path.read_text()}\n{planted}\n")


def _taken(path: Path) -> set[str]:
    """Return the folders of the clone beside fastbn that a file imports from."""
    found = re.findall(r"^\s*(?:from|import) (tests|bench|examples)\b", path.read_text(), re.MULTILINE)
    return set(found)


@pytest.mark.parametrize("folder", ["fastbn", "bench", "examples"])
def test_what_is_not_a_test_imports_no_test(folder):
    """fastbn imports nothing of the clone beside it; the benchmark and the examples import only themselves."""
    for path in (ROOT / folder).rglob("*.py"):
        assert _taken(path) <= {folder} - {"fastbn"}, path
