"""The CUDA kernels as nvcc compiles them for three architectures: no spills, no stack, accesses of 16 bytes to aligned
tensors.

Neither nvcc nor the disassembler needs a GPU. FASTBN_REQUIRE_NVCC=1 makes a missing one an error instead of a skip.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from tests.emulator import build

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
HAS_KERNELS = [path for path in SOURCES if "FASTBN_GLOBAL" in path.read_text()]

PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)

# A mangled name: X_kernel of X.cu and the first template argument, the element's type; then the bytes per type.
KERNEL = re.compile(r"\d(?P<kind>[a-z_]+)_kernel(?:I(?P<dtype>[a-z]|N\w*?E))?")
ELEMENT_BYTES = {"f": 4, "d": 8, "NS_7float16E": 2, "NS_8bfloat16E": 2}
WALK = re.compile(r"4WalkILNS_6KernelE(?P<kernel>[01])ELb(?P<aligned>[01])E")
VEC_SIZE = 8  # elements, as in plan/plan.h
MAX_THREADS = 256

# Number of tensors that a kernel can move, the residual and its gradient included: from global memory to registers
# (load), to shared memory (copy), and from registers back (store).
MOVES = {
    "moments": {"load": 1},
    "normalize": {"load": 2, "store": 1},
    "grad_sums": {"load": 3},
    "input_grad": {"load": 3, "store": 2},
    "stream_forward": {"load": 1, "copy": 1, "store": 1},
    "stream_backward": {"copy": 3, "store": 2},
}
MOVE_NO_ELEMENTS = {"finish", "probe"}
STREAM = {"stream_forward", "stream_backward"}

# LD and ST take any address space: nvcc uses them where it cannot tell that an address is global.
MOVES_16_BYTES = {
    "load": re.compile(r" LDG?\.(?:\w+\.)*128 "),
    "copy": re.compile(r" LDGSTS\.(?:\w+\.)*128 "),
    "store": re.compile(r" STG?\.(?:\w+\.)*128 "),
}


def require(name: str, found: str | None) -> str:
    if found is None:
        if os.environ.get("FASTBN_REQUIRE_NVCC") == "1":
            pytest.fail(f"FASTBN_REQUIRE_NVCC=1, but {name} was not found", pytrace=False)
        pytest.skip(f"needs {name}")
    return found


def find_cuobjdump() -> str | None:
    """Find cuobjdump on PATH, where a toolkit puts it, or in its own package, which does not."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return on_path
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "cuobjdump"), None)


@dataclass
class Compiled:
    source: Path
    binary: Path
    kernels: list[dict[str, str]]  # the resources of every kernel on every architecture, as ptxas reports them


@pytest.fixture(scope="module", params=HAS_KERNELS, ids=lambda path: path.stem)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    source = request.param
    binary = tmp_path_factory.mktemp(source.stem) / f"{source.stem}.fatbin"
    # A fatbin skips the host code, which g++ would compile for seconds and nothing here looks at.
    command = [require("nvcc", shutil.which("nvcc")), "-fatbin", "-std=c++20", "-O3", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", "--threads", "2"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += ["-I", str(ROOT / "csrc"), str(source), "-o", str(binary)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = [match.groupdict() for match in PTXAS.finditer(result.stderr)]
    assert len(kernels) == result.stderr.count("Compiling entry function"), "ptxas's report has another form"
    return Compiled(source, binary, kernels)


def disassemble(binary: Path) -> dict[tuple[str, str], str]:
    """Return the machine code of every kernel, by architecture and mangled name."""
    command = [require("cuobjdump", find_cuobjdump()), "-sass", str(binary)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    code = {}
    for of_arch in result.stdout.split("code for sm_")[1:]:
        arch, *functions = of_arch.split("Function : ")
        for function in functions:
            code[re.match(r"\d+", arch)[0], function.split()[0]] = function
    return code


@pytest.mark.slow
def test_kernels_neither_spill_nor_use_a_stack(compiled: Compiled) -> None:
    assert {kernel["arch"] for kernel in compiled.kernels} == set(ARCHITECTURES)
    wasteful = [k for k in compiled.kernels if (k["stack"], k["stores"], k["loads"]) != ("0", "0", "0")]
    count = f"{len(wasteful)} of {len(compiled.kernels)}"
    assert not wasteful, f"{count} kernels spill or use a stack, the first is {wasteful[0]}"


@pytest.mark.slow
def test_an_sm_holds_the_blocks_that_the_planner_expects(compiled: Compiled) -> None:
    """Registers are handed out to warps in units of 256, from 65536 per SM on these architectures."""
    expected_blocks = build.load().blocks_per_sm
    seen = 0
    for kernel in compiled.kernels:
        kind, dtype = KERNEL.search(kernel["name"]).group("kind", "dtype")
        if kind in MOVE_NO_ELEMENTS | STREAM:
            continue
        walk = WALK.search(kernel["name"])
        rows, aligned = walk["kernel"] == "1", walk["aligned"] == "1"
        expected = expected_blocks(kind, rows=rows, element_size=ELEMENT_BYTES[dtype], aligned=aligned)
        registers_per_warp = -(-int(kernel["registers"]) * 32 // 256) * 256
        assert 65536 // (registers_per_warp * MAX_THREADS // 32) >= expected, kernel
        seen += 1
    # Four dtypes, two walks, aligned or not.
    assert seen == (16 * len(ARCHITECTURES) if compiled.source.stem in MOVES.keys() - STREAM else 0)


@pytest.mark.slow
def test_the_tail_of_a_block_has_no_division(compiled: Compiled) -> None:
    """From the barrier after a block's last vector to the partial sums, on architectures that mark that vector."""
    tails = 0
    for (arch, name), instructions in disassemble(compiled.binary).items():
        after_last_vector = instructions.rpartition(" PREEXIT ")[2]
        if arch == "80" or KERNEL.search(name)["kind"] not in {"moments", "grad_sums"}:
            continue
        tail = re.search(r" BAR\.SYNC.*?STG\.E\.128 ", after_last_vector, re.DOTALL)[0]
        assert " DADD " in tail
        assert not re.search(r" (I2F\S*|MUFU\.RCP) ", tail), f"sm_{arch} {name}"
        tails += 1
    assert tails == (32 if compiled.source.stem in {"moments", "grad_sums"} else 0)


@pytest.mark.slow
def test_elements_move_in_accesses_of_16_bytes(compiled: Compiled) -> None:
    code = disassemble(compiled.binary)
    assert code.keys() == {(kernel["arch"], kernel["name"]) for kernel in compiled.kernels}

    seen, narrow = set(), []
    for (arch, name), instructions in code.items():
        kind, dtype = KERNEL.search(name).group("kind", "dtype")
        if kind in MOVE_NO_ELEMENTS:
            continue
        assert kind in MOVES, f"{name}: expected a kernel of MOVES or MOVE_NO_ELEMENTS"
        seen.add((arch, kind, dtype))
        for move, tensors in MOVES[kind].items():
            # There may be more: loops over vectors may be unrolled.
            expected = tensors * VEC_SIZE * ELEMENT_BYTES[dtype] // 16
            got = len(MOVES_16_BYTES[move].findall(instructions))
            if got < expected:
                narrow.append(f"sm_{arch} {name}: expected {expected} to {move} 16 bytes, got {got}")
    kinds = MOVES.keys() & {compiled.source.stem}
    dtypes = ELEMENT_BYTES.keys() - ({"d"} if kinds <= STREAM else set())  # float64 is not streamed
    assert seen == {(arch, kind, dtype) for arch in ARCHITECTURES for kind in kinds for dtype in dtypes}
    assert not narrow, f"{len(narrow)} counts are too low, the first is {narrow[0]}"


def test_every_kernel_file_is_found() -> None:
    assert MOVES.keys() <= {path.stem for path in HAS_KERNELS}
