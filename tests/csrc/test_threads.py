"""CPU results are bitwise equal for every number of threads, and each instruction set is near the reference."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbn
from fastbn import _C
from fastbn.testing import cases, tolerance
from fastbn.testing.tolerance import assert_close_to_reference

ROOT = Path(__file__).resolve().parents[2]


def _cases(*shapes):
    return [cases.Case(f"{'x'.join(map(str, shape))}-{layout}", shape, layout) for shape, layout in shapes]


CASES = _cases(
    ((8, 64, 28, 28), "contiguous"),
    ((8, 64, 28, 28), "channels_last"),
    ((3, 1, 200, 211), "contiguous"),
    ((4, 3, 128, 130), "channels_last"),
    ((4099, 37), "contiguous"),
    ((2, 500, 7, 7), "contiguous"),
    ((2, 500, 7, 7), "channels_last"),
    ((2, 24, 4, 14, 14), "channels_last_3d"),
    # Few, wide rows, cut into panels of channels; the last has one channel, less than a vector, or a tail.
    ((2, 98_305), "contiguous"),
    ((16, 20_483), "contiguous"),
    ((1, 16_421, 3, 3), "channels_last"),
)


def _run(case, dtype, activation="silu", residual=True, training=True, backend=None):
    """Return output, buffers and gradients of one step."""
    tensors = [cases.make_input(case, dtype), cases.make_vector(case.channels, dtype, "cpu", 3, 0.5, 1.5),
               cases.make_vector(case.channels, dtype, "cpu", 4, -0.5, 0.5)]  # fmt: skip
    tensors += [cases.make_normal(case, dtype, seed=5)] if residual else []
    x, weight, bias, *added = (t.requires_grad_() for t in tensors)
    mean, var = torch.zeros(case.channels, dtype=dtype), torch.ones(case.channels, dtype=dtype)
    fused = {"residual": added[0] if added else None, "activation": activation, "backend": backend}
    output = fastbn.functional.batch_norm(x, mean, var, weight, bias, training, **fused)
    grads = torch.autograd.grad(output, tensors, cases.make_normal(case, dtype, seed=6))
    return [output.detach(), mean, var, *grads]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bitwise_equal_whatever_the_threads(case, dtype, threads):
    for options in ({"activation": "relu"}, {"activation": "silu", "residual": False}, {"training": False}):
        results = []
        for count in (1, 2, 3, 2):  # 2 again: equal from run to run
            threads(count)
            results.append(_run(case, dtype, **options))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), options


# One thread writes the outputs of these with non-temporal stores, once the allocator has pages for them; many threads
# do not. Vectors are cache lines in the first two, nowhere in the third, and in one channel of the last, whose rows
# have tails.
LARGE_CASES = _cases(
    ((8, 48, 80, 80), "contiguous"),
    ((8, 48, 80, 80), "channels_last"),
    ((8, 40, 88, 88), "channels_last"),
    ((1, 16, 401, 401), "contiguous"),
)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_bitwise_equal_with_non_temporal_stores(case, threads):
    threads(8)
    expected = _run(case, torch.float32, "relu")
    threads(1)
    for _ in range(3):
        actual = _run(case, torch.float32, "relu")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        del actual  # so that the next run gets its pages


def _environment(instruction_set: str, threads: int) -> dict[str, str]:
    return os.environ | {"FASTBN_CPU": instruction_set, "OMP_NUM_THREADS": str(threads)}


# A program that runs small cases, which have full vectors, tails and rows of few channels.
_PROGRAM = """
import sys, torch
from fastbn import _C
from fastbn.testing import cases
from tests.csrc import test_threads
table = [case for case in cases.SMALL if case.data == "normal" and case.count > 1]
results = {"instruction_set": _C.build_info()["cpu_instruction_set"]}
for case in table:
    for dtype in cases.DTYPES:
        for activation in ("relu", "gelu") if dtype == torch.float32 else ("gelu",):
            results[f"{case}-{dtype}-{activation}"] = test_threads._run(case, dtype, activation)
torch.save(results, sys.argv[1])
"""


def _allowed(case, dtype, actual):
    """Return the tolerance for normal data: terms of elements are below 4 (z) or 16 (grad * xhat), of sums near 1."""
    if actual.dim() == 1:
        return tolerance.sum_tolerance(dtype, case.count, case.count) + tolerance.ulp(dtype, case.count)
    return tolerance.forward_tolerance(dtype, case.count, 4) + tolerance.gradient_tolerance(dtype, case.count, 16)


@pytest.mark.parametrize("instruction_set", _C.build_info()["cpu_instruction_sets"])
def test_instruction_sets(instruction_set, tmp_path):
    saved = tmp_path / "results.pt"
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(saved)], env=_environment(instruction_set, 1), check=True, timeout=300
    )
    results = torch.load(saved)
    assert results.pop("instruction_set") == instruction_set
    assert len(results) > 100
    table = {case.name: case for case in cases.ORDINARY}
    for name, tensors in results.items():
        case_name, dtype, activation = name.rsplit("-", 2)
        case, dtype = table[case_name], getattr(torch, dtype.removeprefix("torch."))
        # An element within rounding of relu's kink may take the other branch, and change its channel's sums.
        elements = [0] if activation == "relu" else range(len(tensors))
        for i in elements:
            exact = _expected(case, dtype, activation)[i]
            assert_close_to_reference(tensors[i], exact, _allowed(case, dtype, tensors[i]), f"{name}, result {i}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "instruction_set",
    [name for name in _C.build_info()["cpu_instruction_sets"] if name != _C.build_info()["cpu_instruction_set"]],
)
def test_accuracy_of_the_other_instruction_sets(instruction_set):
    selected = ["-k", "cpu", "tests/numerics/test_accuracy.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    run = subprocess.run(
        command, env=_environment(instruction_set, 1), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:]


@functools.cache
def _expected(case, dtype, activation):
    return [t.double() for t in _run(case, dtype, activation, backend="reference")]


def test_an_unknown_instruction_set_is_an_error():
    command = [sys.executable, "-c", "import fastbn"]
    run = subprocess.run(command, env=_environment("sse9", 1), capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert re.search("FASTBN_CPU: expected one of .*portable on this machine, got 'sse9'", run.stderr)
