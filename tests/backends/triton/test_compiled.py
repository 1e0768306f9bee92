"""What Triton compiles, and how often. It runs in processes without TRITON_INTERPRET, and needs no GPU.

bench/triton_kernels.py reads registers, spills and accesses from the code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0"}


def _run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _compile(*options: str) -> list[dict]:
    return json.loads(_run("bench.triton_kernels", "--json", *options))


def _check(kernel: dict) -> None:
    name = f"{kernel['target']} {kernel['case']}"
    # ptxas may give up a register or two for one block more per SM, outside of loops.
    assert kernel["spilled"] <= (16 if name.startswith("sm_80 resident") else 0), f"{name}: {kernel['spilled']} bytes"
    # An SM has 65536 registers: those of 512 threads at least.
    assert kernel["registers"] <= 128 or kernel["warps"] * kernel["registers"] * 32 <= 65536, name
    if "64x64x56x56" not in kernel["case"] or "finish" in kernel["case"]:
        return
    # Runs fill vectors and pointers are aligned: elements move by 16 bytes and in no other way.
    element = {"bf16": 2, "fp32": 4, "fp64": 8}[kernel["case"].split()[3]]
    wide = kernel["elements"] * element // (kernel["warps"] * (64 if kernel["target"].startswith("gfx") else 32) * 16)
    loads, stores = ({int(size): n for size, n in kernel[kind].items()} for kind in ("loads", "stores"))
    assert loads.get(16, 0) >= wide, f"{name}: loads {loads}"
    if kernel["case"].startswith(("normalize", "input_grad")):
        assert stores.get(16, 0) >= wide, f"{name}: stores {stores}"
        assert set(stores) <= {1, 16}, f"{name}: stores {stores}"  # and the mask by bytes


def test_a_kernel_for_an_h200():
    kernels = _compile("--target", "sm_90", "--match", "normalize 64x64x56x56 contiguous bf16")
    assert len(kernels) == 2
    for kernel in kernels:
        _check(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_all_kernels(target):
    kernels = _compile("--target", target)
    assert len(kernels) > 40
    for kernel in kernels:
        _check(kernel)


def _counts(channels: int, inner: int, *sizes: int) -> list[int]:
    """Return the number of compiled kernels after a step of each batch size."""
    return list(map(int, _run("tests.backends.triton.specialisations", *map(str, (channels, inner, *sizes))).split()))


@pytest.mark.parametrize(
    "channels, inner, first",
    [(64, 49, 19), pytest.param(64, 196, 11, marks=pytest.mark.slow), pytest.param(96, 1, 17, marks=pytest.mark.slow)],
)
def test_a_new_batch_size_compiles_nothing(channels, inner, first):
    """A program that keeps a tile has room for a power of two of its rows: within one, sizes share their kernels.

    The larger sizes are read twice, by kernels that know no size at all.
    """
    counts = _counts(channels, inner, *range(first, first + 9), *range(1500, 1509))
    assert set(counts[:9]) == {2} and set(counts[9:]) == {2 + 6}


@pytest.mark.slow
def test_all_batch_sizes_together_compile_little():
    assert _counts(64, 49, *range(1, 513))[-1] <= 20
