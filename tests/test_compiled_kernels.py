"""What nvcc makes of the CUDA kernels: every one compiles for three architectures, without a spill and without a stack.

nvcc needs no GPU. FASTBN_REQUIRE_NVCC=1 makes a missing nvcc an error instead of a skip.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HAS_KERNELS = [path for path in SOURCES if "FASTBN_GLOBAL" in path.read_text()]

PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        if os.environ.get("FASTBN_REQUIRE_NVCC") == "1":
            pytest.fail("FASTBN_REQUIRE_NVCC=1, but nvcc is not on PATH", pytrace=False)
        pytest.skip("needs nvcc")
    return found


def compile_kernels(source: Path, folder: Path) -> list[dict[str, str]]:
    """Resources of every kernel of a file on every architecture, as ptxas reports them."""
    command = [nvcc(), "-std=c++20", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "--threads", "2"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += ["-I", str(ROOT / "csrc"), "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = [match.groupdict() for match in PTXAS.finditer(result.stderr)]
    assert len(kernels) == result.stderr.count("Compiling entry function"), "ptxas's report has another form"
    return kernels


@pytest.mark.slow
@pytest.mark.parametrize("source", HAS_KERNELS, ids=lambda path: path.stem)
def test_kernels_neither_spill_nor_use_a_stack(source: Path, tmp_path: Path) -> None:
    kernels = compile_kernels(source, tmp_path)
    assert {int(kernel["arch"]) for kernel in kernels} == set(ARCHITECTURES)
    wasteful = [k for k in kernels if (k["stack"], k["stores"], k["loads"]) != ("0", "0", "0")]
    assert not wasteful, f"{len(wasteful)} of {len(kernels)} kernels spill or use a stack, the first is {wasteful[0]}"


def test_every_kernel_file_is_found() -> None:
    assert HAS_KERNELS
