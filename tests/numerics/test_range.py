"""Channels at both ends of the number range: no intermediate under- or overflows if the result does not.

Each channel of a tensor has its own magnitude, so that one call has them all, and is measured by its own scale. float64
is the reference: it holds the squares of every float32.
"""

from __future__ import annotations

import pytest
import torch

import fastbn
from fastbn.backends import reference
from fastbn.testing.tolerance import (
    ELEMENT_ROUNDINGS,
    assert_close_to_reference,
    forward_tolerance,
    gradient_tolerance,
    mean_tolerance,
    sum_tolerance,
    ulp,
    unit,
    variance_tolerance,
)

# Standard deviations; a channel reaches three times as far. The last of each list comes close to the largest number.
STDS = {
    torch.float32: (1e-38, 1e-30, 1e-25, 1e-23, 1e-22, 1e-21, 1e-20, 1.0, 1e15, 1e19, 1e22, 1e25, 1e30, 1e36, 1e38),
    torch.float16: (1e-7, 1e-5, 1e-3, 1.0, 1e2, 2e4),
}
STDS[torch.bfloat16] = STDS[torch.float32]
# mean / std of the second half of the channels, at which elements of the dtype still differ.
STEEPNESS = {torch.float32: 1000.0, torch.bfloat16: 20.0, torch.float16: 20.0}
LAYOUTS = ("contiguous", "channels_last", "(N, C)")
EPS = (1e-45, 1e-5)
RELU = 1
MOMENTUM = 0.3


def _shaped(values: torch.Tensor, layout: str) -> torch.Tensor:
    """Return [300, C] in the layout: unchanged, or as 6 images of 5 x 10."""
    if layout == "(N, C)":
        return values
    images = values.view(6, 5, 10, -1)
    images = images.movedim(-1, 1)
    return images.contiguous() if layout == "contiguous" else images


def _per_channel(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax([d for d in range(x.dim()) if d != 1], keepdim=True)


def _total(x: torch.Tensor) -> torch.Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


def _data(dtype: torch.dtype, layout: str, smallest_grad: float):
    """Return (x, residual, grad_out, weight, bias) with a channel per std, about 0 and, if possible, far from 0."""
    generator = torch.Generator().manual_seed(3)
    limit = torch.finfo(dtype).max
    steep = [std for std in STDS[dtype] if 2 * STEEPNESS[dtype] * std < limit]
    std = torch.tensor((*STDS[dtype], *steep), dtype=torch.float64)
    mean = torch.tensor([0.0] * len(STDS[dtype]) + [STEEPNESS[dtype] * s for s in steep], dtype=torch.float64)
    normal = lambda: torch.randn(300, len(std), dtype=torch.float64, generator=generator)  # noqa: E731
    x = (normal() * std + mean).clamp(-limit, limit)
    # At this size gradients of the input do not vanish either.
    grad_out = normal() * torch.clamp(std * 1e-20, min=smallest_grad)
    x, residual, grad_out = (_shaped(t.to(dtype), layout) for t in (x, normal(), grad_out))
    weight, bias = (torch.rand(len(std), generator=generator) + 0.5 for _ in range(2))
    return x, residual, grad_out, weight, bias


def _away_from_kink(grad_out: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.where(z.abs() < 1e-3 * _largest(z), 0.0, grad_out)


@pytest.mark.parametrize("fused, smallest_grad", [(False, 1.0), (True, 1e-12)], ids=["plain", "add_relu-small_grad"])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", STDS, ids=str)
def test_training(ops, dtype, layout, eps, fused, smallest_grad):
    x, residual, grad_out, weight, bias = _data(dtype, layout, smallest_grad)
    residual = residual if fused else None
    index, channels, count = RELU if fused else 0, x.shape[1], x.numel() // x.shape[1]
    exact = [None if t is None else t.double() for t in (x, residual, weight, bias)]
    buffers = [torch.full((channels,), 0.5, dtype=torch.float64) for _ in range(2)]
    output, mean, inv_std, _ = reference.batch_norm_train(*exact, *buffers, None, MOMENTUM, eps, index, False)
    z = reference.normalize(*exact, mean, inv_std, 0, False)[0]
    if fused:
        grad_out = _away_from_kink(grad_out.double(), z).to(dtype)
    flags = (True, True, True, True)
    grads = reference.batch_norm_backward(
        grad_out.double(), exact[0], exact[1], None, *exact[2:], mean, inv_std, True, index, *flags
    )
    xhat = (exact[0] - _per_channel(x, mean)) * _per_channel(x, inv_std)
    grad_z = grad_out.double() if index == 0 else grads[3]

    on_device = [None if t is None else t.to(ops.device) for t in (x, residual, weight, bias)]
    got_buffers = [b.float().to(ops.device) for b in buffers]
    for buffer in got_buffers:
        buffer.fill_(0.5)
    y, m, s, mask = ops.namespace.batch_norm_train(*on_device, *got_buffers, None, MOMENTUM, eps, index, fused)
    saved = (None, mask) if fused else (None, None)
    got = ops.namespace.batch_norm_backward(
        grad_out.to(ops.device), on_device[0], *saved, *on_device[2:], m, s, True, index, *flags
    )

    # The conversion of AVX-512 BF16 flushes subnormal numbers to zero.
    smallest = torch.finfo(dtype).tiny
    var = _total((exact[0] - _per_channel(x, mean)).square()) / count
    deviation = _largest(exact[0] - _per_channel(x, mean)).flatten()
    scale = _largest(xhat * _per_channel(x, weight)) + _per_channel(x, bias)
    scale = scale if residual is None else scale + _largest(exact[1])
    assert_close_to_reference(y, output, forward_tolerance(dtype, count, scale) + smallest, "output")
    # sum_tolerance bounds float32 sums, which half types are added up in too.
    off = mean_tolerance(dtype, count, deviation, mean) + 1e-45
    assert_close_to_reference(m, mean, off, "mean")
    buffer_tolerance = lambda off, exact: MOMENTUM * off + 2 * ulp(torch.float32, exact)  # noqa: E731
    assert_close_to_reference(got_buffers[0], buffers[0], buffer_tolerance(off, buffers[0]), "running_mean")
    off = variance_tolerance(dtype, count, var, mean)
    assert_close_to_reference(got_buffers[1], buffers[1], buffer_tolerance(off, buffers[1]), "running_var")

    per_xhat = sum_tolerance(dtype, count, 1.0)
    grad_scale = _largest(grad_z) * (1 + _largest(xhat)) * _per_channel(x, weight * inv_std)
    tolerance = gradient_tolerance(dtype, count, grad_scale) + smallest
    assert_close_to_reference(got[0], grads[0], tolerance, "grad_input")
    terms, grads_alone = _total((grad_z * xhat).abs()), _total(grad_z.abs())
    # The error of xhat is that of the mean over the std, about as large as that of the sum of terms.
    tolerance = 2 * per_xhat * (terms + grads_alone * torch.clamp(deviation * inv_std, max=1.0))
    tolerance = tolerance + ulp(torch.float32, grads[1]) + torch.finfo(torch.float32).tiny
    assert_close_to_reference(got[1], grads[1], tolerance, "grad_weight")
    assert_close_to_reference(got[2], grads[2], per_xhat * grads_alone + ulp(torch.float32, grads[2]), "grad_bias")
    if fused:
        assert_close_to_reference(got[3], grads[3], ulp(dtype, grads[3]) + smallest, "grad_residual")


@pytest.mark.parametrize("far", [(0, 1), (6, 7)], ids=str)
def test_the_form_of_a_gradient_is_that_of_its_own_channels(ops, far):
    """Channels far from 1 take another form of the formula, whatever the next ones take, which are in work already."""
    x, grad_out = torch.randn(2, 16, 8, 16, 16, generator=torch.Generator().manual_seed(6))
    x[:, far] *= 1e-20
    exact = [x.double(), grad_out.double()]
    mean = _total(exact[0]) / 4096
    inv_std = 1 / (_total((exact[0] - _per_channel(x, mean)).square()) / 4096).sqrt()
    after = (None, None, None, None)
    flags = (True, 0, True, False, False, False)
    expected = reference.batch_norm_backward(exact[1], exact[0], *after, mean, inv_std, *flags)[0]
    moved = [t.to(ops.device) for t in (grad_out, x)]
    saved = [t.to(ops.device) for t in (mean, inv_std)]
    got = ops.namespace.batch_norm_backward(*moved, *after, *saved, *flags)[0]
    xhat = (exact[0] - _per_channel(x, mean)) * _per_channel(x, inv_std)
    scale = _largest(exact[1]) * (1 + _largest(xhat)) * _per_channel(x, inv_std)
    assert_close_to_reference(got, expected, gradient_tolerance(torch.float32, 4096, scale), "grad_input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_data_that_reach_from_one_end_of_the_range_to_the_other(ops, dtype):
    """Differences from the mean exceed the largest number, and standard deviations are close to it."""
    limit = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(5)
    positive = torch.tensor([0.5, 0.8, 0.2, 0.95])  # fraction of a channel
    x = torch.where(torch.rand(300, 4, generator=generator) < positive, limit, -limit).to(dtype)
    grad_out = (torch.randn(300, 4, generator=generator) * 1e20).to(dtype)
    exact = reference.batch_norm_train(x.double(), None, None, None, None, None, None, 0.1, 1e-5, 0, False)
    flags = (True, True, True, False)
    exact_grads = reference.batch_norm_backward(
        grad_out.double(), x.double(), None, None, None, None, *exact[1:3], True, 0, *flags
    )
    x, grad_out = x.to(ops.device), grad_out.to(ops.device)
    got = ops.namespace.batch_norm_train(x, None, None, None, None, None, None, 0.1, 1e-5, 0, False)
    grads = ops.namespace.batch_norm_backward(grad_out, x, None, None, None, None, *got[1:3], True, 0, *flags)
    # 1 / std is a subnormal float32, with two bits less.
    assert_close_to_reference(got[0], exact[0], 4 * ulp(torch.float32, 4.0) + ulp(dtype, 4.0), "output")
    scale = _largest(grad_out.double().cpu()) * 5 * exact[2]
    tolerance = 4 * gradient_tolerance(dtype, 300, scale)
    assert_close_to_reference(grads[0], exact_grads[0], tolerance, "grad_input")
    for which, g, e in zip(("grad_weight", "grad_bias"), grads[1:3], exact_grads[1:3], strict=True):
        tolerance = 4 * sum_tolerance(dtype, 300, 300 * 5e20) + ulp(dtype, e)
        assert_close_to_reference(g, e, tolerance, which)


@pytest.mark.parametrize("eps", [*EPS, 0.3])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_derivatives_of_derivatives(dtype, activation, eps):
    """With create_graph the first derivative is a composition of torch operations, and so is the second."""
    x, residual, grad_out, weight, bias = _data(dtype, "contiguous", 1.0)
    std = x.double().std((0, 2, 3), correction=0)
    with torch.no_grad():
        exact = (x.double(), residual.double(), weight.double(), bias.double())
        z = reference.batch_norm_train(*exact, None, None, None, 0.1, eps, 0, False)[0]
    grad_out = _away_from_kink(grad_out.double(), z).to(dtype)
    # Directions of the second derivatives, about as large as the changes of the channel.
    along = (residual.double().flip(0) * _per_channel(x, std)).to(dtype)

    def first_and_second(first, *leaves):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        grads = first(*leaves)
        second = torch.autograd.grad((grads[0] * along.to(grads[0].dtype)).sum(), leaves, materialize_grads=True)
        return [t.detach() for t in (*grads, *second)]

    def composed(x, residual, weight, bias, grad_out):
        y = fastbn.functional.batch_norm(
            x, None, None, weight, bias, True, 0.1, eps, residual=residual, activation=activation
        )
        return torch.autograd.grad(y, (x, weight, bias, residual), grad_out, create_graph=True)

    def defined(x, residual, weight, bias, grad_out):
        m = x.mean((0, 2, 3), keepdim=True)
        s = ((x - m).square().mean((0, 2, 3), keepdim=True) + eps).rsqrt()
        y = (x - m) * s * _per_channel(x, weight) + _per_channel(x, bias) + residual
        y = y if activation is None else getattr(torch.nn.functional, activation)(y)
        return torch.autograd.grad(y, (x, weight, bias, residual), grad_out, create_graph=True)

    leaves = (x, residual, weight, bias, grad_out)
    got = first_and_second(composed, *leaves)
    expected = first_and_second(defined, *(t.double() for t in leaves))
    names = ("grad_input", "grad_weight", "grad_bias", "grad_residual", "of input", "of residual", "of weight")
    names += ("of bias", "of grad_out")
    for name, actual, exact in zip(names, got, expected, strict=True):
        # Terms that cancel are several times as large as their sum, and the mean of a steep channel is rounded.
        scale = _largest(exact) if exact.dim() > 1 else exact.abs() + exact.abs().median()
        steep = STEEPNESS[dtype] if dtype == torch.float32 else 1.0
        tolerance = (64 * ELEMENT_ROUNDINGS * unit(dtype) * steep**0.5 + torch.finfo(dtype).eps) * scale
        assert_close_to_reference(actual, exact, tolerance + torch.finfo(dtype).tiny, name)
