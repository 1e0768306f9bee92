"""Accuracy of the CPU's float32 sums for data that are hard for them, and rounding to bfloat16.

Each test runs for each instruction set and both kinds of layout.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastbn
from fastbn import _C
from fastbn.backends import native
from fastbn.testing.tolerance import assert_error_bound

CHANNELS = 19
COUNT = 10 * 100  # elements per channel, as 10 images of 10 x 10
FORMATS = (torch.contiguous_format, torch.channels_last)
# The fast tier takes the instruction set that this machine uses; each test of another one starts a process.
INSTRUCTION_SETS = [
    pytest.param(name, marks=[] if name == _C.build_info()["cpu_instruction_set"] else [pytest.mark.slow])
    for name in _C.build_info()["cpu_instruction_sets"]
]
MEANS = tuple(f"mean {mean:g}" for mean in (1e2, 1e4, 1e6))
MOMENTA = (1.0, 0.1)
EPS = 1e-5


def _hard_data() -> dict[tuple[str, torch.dtype], tuple[torch.Tensor, float]]:
    """Return tensors [10, CHANNELS, 10, 10] and the relative tolerance of their variance."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10, CHANNELS, 10, 10, generator=generator, dtype=torch.float64)
    data = {name: (normal + float(name.split()[1]), 1e-6) for name in MEANS}
    # All five samples of the pivot lie in the first row or column, which is padding.
    border = torch.zeros(10, 10, dtype=torch.bool)
    border[0] = border[:, 0] = True
    data["padded"] = (torch.where(border, 0.0, normal + 100), 1e-6)
    # Only the samples are far off, so that sums about them cancel.
    sampled = torch.zeros(10, 1, 10, 10, dtype=torch.bool)
    for i in (1, 3, 5, 7, 9):  # of ten images, and of rows and of pixels in channels_last
        sampled[i, 0, i, 0] = sampled[i, 0, 0, 0] = True
    data["pivot far off"] = (torch.where(sampled, 30.0, normal * 0.01), 1e-6)
    data["squares overflow"] = (normal * 1e25, 1e-6)
    data["squares vanish"] = (normal * 1e-25, 1e-6)
    data["squares are subnormal"] = (normal * 1e-22, 1e-6)
    data["nearly infinite"] = (torch.sign(normal) * 3e38, 1e-6)
    one_bad = normal.clone()
    one_bad[3, 7, 5, 5] = torch.inf
    one_bad[4, 11, 5, 5] = torch.nan
    data["inf and NaN in two channels"] = (one_bad, 1e-6)
    return {
        (name, dtype): (values.to(dtype), bound)
        for name, (values, bound) in data.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


def _statistics():
    ops = native.CPU.ops
    return {
        (name, str(layout)): ops.channel_stats(values.contiguous(memory_format=layout))
        for name, (values, _) in _hard_data().items()
        for layout in FORMATS
    }


def _training(batch_norm=fastbn.functional.batch_norm):
    """Return output and updated buffers for float32 data far from 0."""
    results = {}
    for name in MEANS:
        values, _ = _hard_data()[name, torch.float32]
        for layout in FORMATS:
            x = values.contiguous(memory_format=layout)
            for momentum in MOMENTA:
                mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
                y = batch_norm(x, mean, var, training=True, momentum=momentum, eps=EPS)
                results[name, str(layout), momentum] = y, mean, var
    return results


# Standard deviations of data and gradients whose products overflow or underflow in float32.
PRODUCTS = {"ordinary": (1.0, 1.0), "overflow": (1e25, 1e15), "vanish": (1e-15, 1e-30), "are subnormal": (1e-12, 1e-29)}


def _product_data():
    """Return (input, grad_out) of bfloat16, by name."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda: torch.randn(10, CHANNELS, 10, 10, generator=generator)  # noqa: E731
    return {name: ((normal() * std).bfloat16(), (normal() * grad).bfloat16()) for name, (std, grad) in PRODUCTS.items()}


def _gradient_sums():
    ops = native.CPU.ops
    return {
        (name, str(layout)): ops.grad_sums(
            grad_out.contiguous(memory_format=layout),
            x.contiguous(memory_format=layout),
            *[None] * 4,
            *_mean_and_inv_std(x),
            0,
        )
        for name, (x, grad_out) in _product_data().items()
        for layout in FORMATS
    }


def _mean_and_inv_std(x):
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean, var.rsqrt()


def _ties():
    """Return bfloat16 numbers and float32 factors, of which many products lie exactly between two bfloat16 numbers."""
    halves = torch.arange(-256, 257, dtype=torch.float32)  # exact in bfloat16
    factors = 1 + torch.arange(1, 16, dtype=torch.float32) * 2**-8
    return halves.bfloat16().repeat(len(factors), 1).t().contiguous(), factors


def _rounded():
    """Return the ties as an output and as a gradient, in rows and in columns, where a channel is one factor."""
    ops = native.CPU.ops
    x, factors = _ties()
    zeros, ones = torch.zeros(len(factors), dtype=torch.float64), torch.ones(len(factors), dtype=torch.float64)
    results = {}
    for name, values in (("columns", x), ("rows", x.t().unsqueeze(0).contiguous())):
        y = ops.normalize(values, None, factors, None, zeros, ones, 0, False)[0]
        grad = ops.input_grad(values, values, None, None, factors, None, zeros, ones, None, None, None, 0, False)[0]
        results[name] = [t if t.dim() == 2 else t[0].t() for t in (y, grad)]
    return results


def _with(instruction_set, function, path):
    """Return the result of a function of this file under an instruction set, which a process chooses once."""
    program = (
        f"import sys, torch; from tests.csrc import test_cpu_statistics as t; torch.save(t.{function}(), sys.argv[1])"
    )
    environment = os.environ | {"FASTBN_CPU": instruction_set, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=True, timeout=120)
    return torch.load(path)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_variance_of_hard_data(instruction_set, tmp_path):
    data = _hard_data()
    for (name, layout), (mean, var) in _with(instruction_set, "_statistics", tmp_path / "statistics.pt").items():
        values, bound = data[name]
        rows = values.double().transpose(0, 1).flatten(1)
        exact_mean = rows.mean(1)
        exact = (rows - exact_mean[:, None]).square().mean(1)
        finite = exact.isfinite() & (exact > 0)
        assert torch.equal(var[exact == 0], exact[exact == 0]), (name, layout)
        assert torch.equal(exact.isfinite(), var.isfinite()), (name, layout)
        if not finite.any():  # bfloat16 rounds 1e6 plus a normal value to a constant
            continue
        error = ((var - exact).abs() / exact)[finite].max().item()
        assert error <= bound, f"{name}, {layout}: relative error {error:.2g}"
        off = ((mean - exact_mean).abs() / exact.sqrt())[finite].max().item()
        assert off <= bound, f"{name}, {layout}: mean off by {off:.2g} standard deviations"


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_running_statistics_and_output_far_from_zero(instruction_set, tmp_path):
    """running_mean and running_var are off by at most 1e-6 of themselves, the output by as much as stock's or 2 ulp.

    The reference is of the float32 data, whose own rounding is thus no error: 1e6 plus a normal value is a multiple of
    1/16. Differences of an element and a pivot among the data are then exact, and what a few terms added in float32 at
    a time round (LaneSums of csrc/cpu/kernels/sums.h) averages out, so what remains at every mean is little more than
    the rounding of a float32 buffer, 6e-8.
    """
    stock = _training(torch.nn.functional.batch_norm)
    for (name, layout, momentum), (y, *buffers) in _with(instruction_set, "_training", tmp_path / "buffers.pt").items():
        what = f"{name}, {layout}, momentum {momentum}"
        values, _ = _hard_data()[name, torch.float32]
        x = values.double()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        batch = {"running_mean": mean.flatten(), "running_var": var.flatten() * (COUNT / (COUNT - 1))}
        before = {"running_mean": 0.0, "running_var": 1.0}
        for buffer, (which, exact) in zip(buffers, batch.items(), strict=True):
            expected = (1 - momentum) * before[which] + momentum * exact
            error = ((buffer.double() - expected) / expected).abs().max().item()
            assert error <= 1e-6, f"{which}, {what}: relative error {error:.2g}"
        assert_error_bound(y, (x - mean) / (var + EPS).sqrt(), stock[name, layout, momentum][0], y.dtype, what)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_sums_of_products_that_float32_does_not_hold(instruction_set, tmp_path):
    data = _product_data()
    for (name, layout), sums in _with(instruction_set, "_gradient_sums", tmp_path / "sums.pt").items():
        x, grad_out = (t.double() for t in data[name])
        mean, inv_std = _mean_and_inv_std(x)
        xhat = (x - mean.view(1, -1, 1, 1)) * inv_std.view(1, -1, 1, 1)
        for which, actual, terms in zip(("grad", "grad * xhat"), sums, (grad_out, grad_out * xhat), strict=True):
            error = (actual - terms.sum((0, 2, 3))).abs() / terms.square().sum((0, 2, 3)).sqrt()
            assert error.max().item() <= 1e-6, f"sum of {which}, {name}, {layout}: relative error {error.max():.2g}"


@pytest.mark.parametrize("which", ["output", "gradient"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_ties_are_rounded_to_even(instruction_set, which, tmp_path):
    x, factors = _ties()
    product = x.double() * factors
    expected = product.float().bfloat16()
    nearest = (expected.double() - product).abs()
    assert torch.equal(product.float().double(), product)
    # Half of the spacing of bfloat16 at the product, so that both neighbours are equally near.
    is_tie = (nearest > 0) & (nearest == torch.ldexp(torch.ones_like(product), torch.frexp(product).exponent - 9))
    assert is_tie.sum() > 100
    for layout, results in _with(instruction_set, "_rounded", tmp_path / "rounded.pt").items():
        actual = results[("output", "gradient").index(which)]
        assert torch.equal(actual, expected), f"{layout}: {int((actual != expected).sum())} of {actual.numel()} differ"
