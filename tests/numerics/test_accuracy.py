"""The acceptance criterion: the error against float64 is at most stock torch's on the same case, or 2 ulp."""

from __future__ import annotations

import pytest
import torch

import fastbn
from fastbn.backends import native, reference
from fastbn.testing import cases
from fastbn.testing.tolerance import assert_error_bound
from tests import implementations

EPS = 1e-5
MOMENTUM = 0.3
CASES = [case for case in cases.ORDINARY if case.numel]
ACCURATE = ("reference", "cpu", "cuda", "triton", "triton_split")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ops, case", implementations.pairs(CASES, *ACCURATE), indirect=["ops"])
def test_error_is_at_most_stocks_or_two_ulp(ops, case, dtype):
    x, grad_out = cases.make_input(case, dtype, ops.device), cases.make_normal(case, dtype, ops.device, seed=2)
    vector = lambda seed, low, high: cases.make_vector(  # noqa: E731
        case.channels, torch.float32, ops.device, seed, low, high
    )
    weight, bias, mean, var = vector(3, 0.5, 1.5), vector(4, -0.5, 0.5), vector(5, -0.5, 0.5), vector(6, 0.5, 1.5)

    tensors = (x, grad_out, weight, bias, mean, var)
    actual = _measure(ops.namespace, *tensors)
    exact = _measure(reference, *(t.cpu().double() for t in tensors))
    stock = _stock(*tensors)
    names = ("output", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
    failures = []
    for name, got, expected, rival in zip(names, actual, exact, stock, strict=True):
        try:
            assert_error_bound(got, expected, rival, got.dtype, name)
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)


def _measure(namespace, *tensors):
    x, grad_out, weight, bias, mean, var = (t.clone() if t.dim() == 1 else t for t in tensors)
    y, m, s, _ = namespace.batch_norm_train(x, None, weight, bias, mean, var, None, MOMENTUM, EPS, 0, False)
    flags = (True, True, True, False)
    grads = namespace.batch_norm_backward(grad_out, x, None, None, weight, bias, m, s, True, 0, *flags)
    return y, mean, var, *grads[:3]


# For bfloat16, eight terms are added in float32 before float64: it alone needs other channels, one of which does not
# cancel.
@pytest.mark.parametrize(
    "dtype, channels", [(torch.float32, 1), (torch.float16, 1), (torch.float32, 8), (torch.bfloat16, 8)], ids=str
)
@pytest.mark.parametrize("layout", ["(N, C)", "(N, C, L)"])
def test_gradients_of_vectors_where_terms_cancel(dtype, channels, layout):
    """The sum of independent terms is often much smaller than they are, and so is its ulp.

    The bound is that of the test above, over many draws, of which the worst cancel to a few percent.
    """
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        shape = (300, channels) if layout == "(N, C)" else (2, channels, 150)
        x, grad_out = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight, bias = torch.rand(channels, generator=generator) + 0.5, torch.zeros(channels)
        tensors = (x, grad_out, weight, bias, torch.zeros(channels), torch.ones(channels))
        actual = _measure(native.CPU.ops, *tensors)
        exact = _measure(reference, *(t.double() for t in tensors))
        stock = _stock(*tensors)
        for name, i in (("grad_weight", 4), ("grad_bias", 5)):
            assert_error_bound(actual[i], exact[i], stock[i], actual[i].dtype, f"{name}, seed {seed}")


@pytest.mark.parametrize("layout", ["(N, C)", "(N, C, L)"])
@pytest.mark.parametrize("ops", implementations.params("reference", "cpu"), indirect=True)
def test_gradients_with_a_large_mean(ops, layout):
    """The mean of the gradients is rounded to float32, and a correction restores the digits lost.

    The rounding is as large as the gradients' differences. CUDA is left out: its float32 sums lose as much before.
    """
    generator = torch.Generator().manual_seed(6)
    # Multiples of 1/16, so that differences from the mean are exact.
    x = (torch.randn(300, 5, generator=generator) * 16).round() / 16
    grad_out = 300.3 + torch.randn(300, 5, generator=generator) * 1e-4
    if layout == "(N, C, L)":
        x, grad_out = (t.view(3, 100, 5).transpose(1, 2).contiguous() for t in (x, grad_out))
    _, m, s, _ = reference.batch_norm_train(x, *[None] * 6, MOMENTUM, EPS, 0, False)
    got, exact = (
        namespace.batch_norm_backward(*tensors, *[None] * 4, m, s, True, 0, True, False, False, False)[0]
        for namespace, tensors in ((ops.namespace, (grad_out, x)), (reference, (grad_out.double(), x.double())))
    )
    assert_error_bound(got, exact, exact, torch.float32, "grad_input")


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.7])
def test_second_derivatives_know_eps(eps):
    generator = torch.Generator().manual_seed(7)
    x, grad_out, along = (torch.randn(6, 3, 4, generator=generator, dtype=torch.float64) * 0.3 for _ in range(3))
    x.requires_grad_()
    results = []
    for batch_norm in (fastbn.functional.batch_norm, torch.nn.functional.batch_norm):
        y = batch_norm(x, None, None, None, None, True, MOMENTUM, eps)
        (grad,) = torch.autograd.grad(y, x, grad_out, create_graph=True)
        results.append(torch.autograd.grad((grad * along).sum(), x)[0])
    # Tensors are float64, since each order multiplies terms that cancel.
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def _stock(x, grad_out, weight, bias, mean, var):
    if x.is_cuda:  # cuDNN reads unaligned tensors as if they were aligned
        x, grad_out = (t.clone() for t in (x, grad_out))
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    mean, var = mean.clone(), var.clone()
    y = torch.batch_norm(x, weight, bias, mean, var, True, MOMENTUM, EPS, torch.backends.cudnn.enabled)
    return y.detach(), mean, var, *torch.autograd.grad(y, (x, weight, bias), grad_out)
