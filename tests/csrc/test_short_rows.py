"""Rows shorter than a vector, which CPU kernels without AVX-512 copy to rows of one vector, in each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastbn import _C

# Frozen statistics, whose gradient is written by the loop that sums for the parameters. In bfloat16, sums that are tiny
# or not finite are taken again in double, by a loop that must leave the gradient alone. (257, 8) ends in a short row of
# packed rows.
_FROZEN = """
import sys, torch
from fastbn import _C, functional

assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
for shape in (32, 8, 9), (150, 8, 3), (64, 8, 2, 2), (257, 8):
    for size in 1e-30, 1.0, float("inf"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        grad = torch.randn(shape, generator=generator).mul(min(size, 1)).bfloat16()
        grad.view(-1)[5] = size
        var, weight = torch.rand(8, generator=generator) + 0.5, torch.ones(8, requires_grad=True)
        options = {"training": False, "eps": 1e-5, "backend": "cpu"}
        y = functional.batch_norm(x, torch.zeros(8), var, weight, torch.zeros(8), **options)
        y.backward(grad)
        scale = (var + 1e-5).rsqrt().view(8, *[1] * (len(shape) - 2))
        expected = grad.float() * scale
        actual = x.grad.float()
        same = (actual == expected) | ((actual - expected).abs() <= expected.abs() * 2**-8)  # one rounding to bfloat16
        assert same.all(), (shape, size, int((~same).sum()))
"""


@pytest.mark.parametrize("instruction_set", _C.build_info()["cpu_instruction_sets"])
def test_sums_that_are_taken_again_leave_the_gradient_alone(instruction_set):
    env = os.environ | {"FASTBN_CPU": instruction_set}
    done = subprocess.run([sys.executable, "-c", _FROZEN, instruction_set], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
