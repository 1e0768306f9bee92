"""float64 against extended precision: an error of at most stock's on the same case, or 4 ulp.

Everything else is measured by float64 (`fastbn/testing/tolerance.py`), so float64 itself needs a longer number:
numpy.longdouble, which has 64 bits of mantissa on x86.
"""

from __future__ import annotations

import pytest
import torch

from fastbn.cli import main
from fastbn.testing import cases, compare, extended, tolerance
from tests import implementations, tiers

EPS = 1e-5
MOMENTUM = 0.3
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [case for case in cases.ORDINARY if case.numel and case.count > 1 and case.data not in ("inf", "nan")]
SMALL = [case for case in CASES if case in cases.SMALL_DENSE]


def _tensors(case, device):
    x, grad_out = cases.make_input(case, torch.float64, device), cases.make_normal(case, torch.float64, device, seed=2)
    vectors = [
        cases.make_vector(case.channels, torch.float64, device, seed, low, high)
        for seed, low, high in ((3, 0.5, 1.5), (4, -0.5, 0.5), (5, -0.5, 0.5), (6, 0.5, 1.5))
    ]
    return x, grad_out, *vectors


def _assert_held(results, what):
    """Assert that each of {name: (actual, stock's, exact, scale)} is within the bound, in spacings of float64 at the
    scale.
    """
    failures = []
    for name, (actual, stock, exact, scale) in results.items():
        error, rival = extended.error_in_ulp(actual, exact, scale), extended.error_in_ulp(stock, exact, scale)
        if not error <= max(rival, tolerance.ACCEPTED_ULPS_FLOAT64):
            failures.append(f"{name}: {error:.2f} ulp, stock's {rival:.2f}")
    assert not failures, f"{what}: " + "; ".join(failures)


@pytest.fixture(autouse=True)
def _extended_precision():
    reason = extended.why_unavailable()
    if reason:
        pytest.skip(reason)


def _params():
    for name in ("reference", "cpu", "emulator", "cuda", "triton", "triton_split"):
        marks = implementations.marks(name)
        for case in SMALL if implementations.is_slow(name) else CASES:
            yield pytest.param(name, case, id=f"{name}-{case}", marks=[*marks, *tiers.marks(case)])


@pytest.mark.parametrize("ops, case", list(_params()), indirect=["ops"])
def test_training(ops, case):
    x, grad_out, weight, bias, mean, var = _tensors(case, ops.device)
    buffers, stock_buffers = [mean.clone(), var.clone()], [mean.clone(), var.clone()]
    y, m, s, _ = ops.namespace.batch_norm_train(x, None, weight, bias, *buffers, None, MOMENTUM, EPS, 0, False)
    flags = (True, True, True, False)
    grads = ops.namespace.batch_norm_backward(grad_out, x, None, None, weight, bias, m, s, True, 0, *flags)
    stock_y, *_ = torch.ops.aten.native_batch_norm(x, weight, bias, *stock_buffers, True, MOMENTUM, EPS)
    stock_grads = torch.ops.aten.native_batch_norm_backward(
        grad_out, x, weight, *stock_buffers, m, s, True, EPS, [True] * 3
    )

    wide_x, wide_grad, *vectors = (extended.wide(t) for t in (x, grad_out, weight, bias, mean, var))
    exact_mean, exact_var = extended.statistics(wide_x)
    exact_inv_std = extended.inverse_std(exact_var, EPS)
    # CUDA's output uses the mean as it is saved, in float64; the others correct for its rounding.
    about = None if ops.name in ("reference", "cpu") else extended.wide(m)
    exact_y = extended.normalize(extended.deviations(wide_x, about), *vectors[:2], exact_inv_std)
    unbiased = exact_var * case.count / (case.count - 1)
    exact_buffers = [extended.running(b, v, MOMENTUM) for b, v in zip(vectors[2:], (exact_mean, unbiased), strict=True)]
    # The exact gradients for the statistics as they were saved, float64 numbers, which the op is given.
    saved = (wide_grad, extended.deviations(wide_x, extended.wide(m)), vectors[0], extended.wide(s))
    exact_grads = extended.gradients(*saved, True)
    largest = [abs(g).max() for g in exact_grads]
    scales = extended.scales_of_gradients(*saved)
    results = {
        "running_mean": (buffers[0], stock_buffers[0], exact_buffers[0], None),
        "running_var": (buffers[1], stock_buffers[1], exact_buffers[1], None),
        "output": (y, stock_y, exact_y, None),
    }
    for i, name in enumerate(("grad_input", "grad_weight", "grad_bias")):
        results[name] = (grads[i], stock_grads[i], exact_grads[i], max(largest[i], scales[i]))
    _assert_held(results, case)


@pytest.mark.parametrize("steepness", [1e2, 7e6, 1e9])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ops", implementations.params("reference", "cpu"), indirect=True)
def test_far_from_zero(ops, layout, steepness):
    """The mean is far larger than the standard deviation, and the digits that its rounding to float64 loses are
    restored.
    """
    case = cases.make_case("far", 6, 9, 12, 13, layout=layout)
    x = cases.make_normal(case, torch.float64, seed=8) * 1e-2 + 1e-2 * steepness
    ones, zeros = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    y = ops.namespace.batch_norm_train(x, None, ones, zeros, None, None, None, MOMENTUM, EPS, 0, False)[0]
    wide_x = extended.wide(x)
    inv_std = extended.inverse_std(extended.statistics(wide_x)[1], EPS)
    exact = extended.normalize(extended.deviations(wide_x), extended.wide(ones), extended.wide(zeros), inv_std)
    assert extended.error_in_ulp(y, exact) <= tolerance.ACCEPTED_ULPS_FLOAT64


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "ops, shape",
    [
        pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}", marks=implementations.marks(name))
        for name in ("reference", "cpu", "emulator", "cuda", "triton", "triton_split")
        for shape in ((129, 2, 5, 1), (64, 3, 28, 28), (4096, 8, 1, 1), (24, 57, 28, 28))
        if shape[0] == 129 or not implementations.is_slow(name)
    ],
    indirect=["ops"],
)
def test_sum_of_equal_gradients(ops, shape, layout):
    """As `y.sum().backward()` has them: rounding errors of equal terms have one sign and do not average out."""
    case = cases.make_case("equal", *shape, layout=layout)
    x, _, weight, _, mean, var = _tensors(case, ops.device)
    inv_std, flags = (var + EPS).rsqrt(), (False, True, True, False)
    shifted = extended.wide(x - mean.view(1, -1, 1, 1))
    for seed in range(4):
        value = cases.make_normal(case, torch.float64, ops.device, seed=seed)[:1, :, :1, :1]
        grad_out = value.expand_as(x).contiguous(memory_format=FORMATS[layout])
        inputs = grad_out, x, None, None, weight, None, mean, inv_std
        actual = ops.namespace.batch_norm_backward(*inputs, True, 0, *flags)[2]
        stock = torch.ops.aten.native_batch_norm_backward(
            grad_out, x, weight, None, None, mean, inv_std, True, EPS, [False, True, True]
        )[2]
        exact = extended.gradients(
            extended.wide(grad_out), shifted, *(extended.wide(t) for t in (weight, inv_std)), True
        )
        _assert_held({"grad_bias": (actual, stock, exact[2], None)}, f"{case}, seed {seed}")


@pytest.mark.slow
def test_verify_measures_float64(capsys, monkeypatch):
    assert main(["verify", "--quick"]) == 0
    assert "float64" in capsys.readouterr().out.split("Errors are")[0]
    exact = compare.batch_norm

    def off_by_nine_ulp(x, *args, **kwargs):
        y = exact(x, *args, **kwargs)
        return y * (1 + 2**-49) if x.dtype == torch.float64 else y

    monkeypatch.setattr(compare, "batch_norm", off_by_nine_ulp)
    assert main(["verify", "--quick"]) == 1
    assert "FAIL  output: expected at most" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_says_why_it_leaves_float64_out(capsys, monkeypatch):
    monkeypatch.setattr(extended, "np", None)
    assert main(["verify", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert (
        "float64 was left out: numpy is not installed." in printed and "float64" not in printed.split("Errors are")[0]
    )
