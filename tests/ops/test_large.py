"""More than 2^31 elements: offsets are 64-bit everywhere. The reference is summed in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastbn.testing import cases
from tests import implementations

EPS = 1e-5
RELU = 1
# Input, output and input gradient in bfloat16 take 4 GiB each, the mask a sixteenth of that, and torch and the pieces
# the rest (an estimate).
NEEDED_GIB = 14


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.parametrize("case", cases.LARGE, ids=str)
@pytest.mark.parametrize("ops", implementations.params("cuda"), indirect=True)
def test_beyond_int32(ops, case):
    assert case.numel > 2**31
    x = cases.make_input(case, torch.bfloat16, ops.device)
    output, mean, inv_std, mask = ops.namespace.batch_norm_train(
        x, None, None, None, None, None, None, 0.1, EPS, 1, True
    )
    total, squares = torch.zeros(2, 2, dtype=torch.float64, device=ops.device)
    for image in x:
        for rows in image.split(1024, dim=1):
            total += rows.double().sum((1, 2))
            squares += rows.double().square().sum((1, 2))
    expected = total / case.count
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(inv_std, (squares / case.count - expected**2 + EPS).rsqrt(), rtol=1e-5, atol=0)
    for corner in ((0, 0, 0, 0), (-1, -1, -1, -1), (-1, 0, -1, -1), (1, 1, 2**14, 77)):
        z = (x[corner].double() - mean[corner[1]]) * inv_std[corner[1]]
        torch.testing.assert_close(output[corner].double(), z.clamp(min=0), rtol=2**-8, atol=1e-6)
    assert mask.numel() * 8 >= case.numel
    grads = ops.namespace.batch_norm_backward(
        output, x, None, mask, None, None, mean, inv_std, True, 1, True, False, False, False
    )
    # With grad_out = relu(z) the gradient is z * [z > 0] less its projections on 1 and z, whose averages are known.
    for corner in ((0, 0, 0, 0), (-1, -1, -1, -1), (1, 1, 2**14, 77)):
        z = ((x[corner].double() - mean[corner[1]]) * inv_std[corner[1]]).item()
        expected = (max(z, 0.0) - 0.398942 - z * 0.5) * inv_std[corner[1]].item()
        assert abs(grads[0][corner].item() - expected) < 0.02


def _available_gib() -> float:
    """Return the memory that processes may still take; infinite where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] / 2**20 if found else float("inf")


def _pieces(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Cut tensors of shape [N, C, H, W] into the same pieces of [C, rows, W], of some three million elements."""
    for images in zip(*tensors, strict=True):
        yield from zip(*(image.split(128, dim=1) for image in images), strict=True)


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.parametrize("case", cases.LARGE, ids=str)
def test_every_element_beyond_int32(case):
    """Compare all of a training step of batch norm and relu on the CPU with float64, a piece at a time.

    grad_out is the output. Where z is so near 0 that rounding decides on relu's branch, so is grad_out, and the bounds
    hold on either side: half a unit in the last place of bfloat16, and float32's rounding at the scale of the terms.
    """
    if (available := _available_gib()) < NEEDED_GIB:
        pytest.skip(f"needs {NEEDED_GIB} GiB of memory, {available:.1f} are available")
    ops = torch.ops.fastbn
    x = cases.make_input(case, torch.bfloat16)
    weight, bias = torch.tensor([1.25, -0.75]), torch.tensor([0.5, -0.25])
    running_mean, running_var, batches = torch.zeros(2), torch.ones(2), torch.tensor(0)
    output, mean, inv_std, mask = ops.batch_norm_train(
        x, None, weight, bias, running_mean, running_var, batches, 0.1, EPS, RELU, True
    )
    assert output.stride() == x.stride() and mask.numel() * 8 >= case.numel

    total, squares = torch.zeros(2, 2, dtype=torch.float64)
    for (piece,) in _pieces(x):
        wide = piece.double()
        total += wide.sum((1, 2))
        squares += wide.square_().sum((1, 2))
    count = case.count
    expected_mean = total / count
    var = squares / count - expected_mean**2  # the mean is near 0, so nothing cancels
    expected_inv_std = (var + EPS).rsqrt()
    # Sums take 16 terms in float32, each rounded to 2^-24, before they go on in double: 16 * 2^-24 is 9.5e-7.
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(inv_std, expected_inv_std, rtol=1e-6, atol=0)
    torch.testing.assert_close(running_mean.double(), 0.1 * expected_mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(running_var.double(), 0.9 + 0.1 * var * count / (count - 1), rtol=1e-6, atol=0)
    assert batches == 1

    def column(vector: torch.Tensor) -> torch.Tensor:
        return vector.double()[:, None, None]

    sum_grad, sum_grad_xhat = torch.zeros(2, 2, dtype=torch.float64)
    for piece, y in _pieces(x, output):
        xhat = (piece.double() - column(expected_mean)) * column(expected_inv_std)
        expected = (xhat * column(weight) + column(bias)).clamp_(min=0)
        wide = y.double()
        _assert_within(wide, expected)
        sum_grad += wide.sum((1, 2))
        sum_grad_xhat += (wide * xhat).sum((1, 2))

    grad_input, grad_weight, grad_bias, _ = ops.batch_norm_backward(
        output, x, None, mask, weight, bias, mean, inv_std, True, RELU, True, True, True, False
    )
    assert grad_input.stride() == x.stride()
    torch.testing.assert_close(grad_bias.double(), sum_grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_weight.double(), sum_grad_xhat, rtol=1e-6, atol=0)
    for piece, y, grad in _pieces(x, output, grad_input):
        xhat = (piece.double() - column(expected_mean)) * column(expected_inv_std)
        through_statistics = column(sum_grad / count) + xhat * column(sum_grad_xhat / count)
        expected = (y.double() - through_statistics) * column(weight) * column(expected_inv_std)
        _assert_within(grad.double(), expected)


def _assert_within(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check against half a unit in the last place of bfloat16, and 16 roundings of float32 of terms below 8."""
    error = (actual - expected).abs_()
    bound = expected.abs_().mul_(2.0**-8).add_(16 * 8 * 2.0**-24)
    assert (error <= bound).all(), f"the largest error beyond its bound is {(error - bound).max().item():.3g}"
