"""fastbn.autograd.whitening on every backend against its definition in float64, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.autograd.whitening import METHODS, JointMoments, Whitening, whiten
from fastbn.backends import registry
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Call
from tests import implementations
from tests.stock import normal
from tests.whitening import correlated, definition

EPS = 1e-3
BACKENDS = ("reference", "cpu", "emulator", "triton", "torch")
# Rows, images with more elements than a group has channels, and images with fewer of them.
SHAPES = [(9, 4), (3, 4, 7), (2, 4, 3, 5), (8, 4, 3)]
GIVEN = "input", "residual", "weight", "bias"


@pytest.fixture(autouse=True)
def node_or_function():
    """Run once: no node takes part in these."""


@pytest.fixture(params=[pytest.param(name, marks=implementations.marks(name)) for name in BACKENDS])
def backend(request):
    if request.param in ("emulator", "triton"):
        implementations.load(request.param)
    return request.param


def _call(tensors: list[Tensor | None], training: bool = True, activation: str | None = None, running=None) -> Call:
    mean, cov = (None, None) if running is None else (running.mean, running.cov)
    var = None if cov is None else cov.diagonal(dim1=-2, dim2=-1).reshape(-1).contiguous()
    return Call(*tensors, mean, var, None, 0.1, EPS, activation_index(activation), training)


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x, residual = correlated(*shape), 0.5 * normal(*shape, seed=1)
    weight, bias = 1 + 0.3 * normal(shape[1], seed=2), 0.3 * normal(shape[1], seed=3)
    return [t.to(dtype).contiguous().requires_grad_() for t in (x, residual, weight, bias)]


def _expected(tensors, whitening, activation, running=None):
    x, residual, weight, bias = tensors
    z, *_ = definition(x, whitening, *(() if running is None else running[:2]))
    wide = (-1, *[1] * (x.dim() - 2))
    z = z * weight.view(wide) + bias.view(wide) + residual
    return z if activation is None else getattr(F, activation)(z)


def _assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Results are sums of at most 30 products, of elements of up to 5. The covariances have condition numbers below
    100, and gaps between eigenvalues, by which the definition divides, of 0.01 and more: some 1e4 spacings of 1."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("group_size", [4, 2, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(backend, shape, method, group_size, mode, activation):
    tensors, grad_out = _tensors(shape), normal(*shape, seed=4)
    whitening, running = Whitening(method, 4, group_size, EPS), None
    if mode == "evaluation":
        _, mean, cov = definition(correlated(50, 4, seed=7), whitening)
        running = JointMoments(mean, cov, 0)
    expected = _expected(tensors, whitening, activation, running)
    output, moments = whiten(_call(tensors, running is None, activation, running), whitening, running, backend)
    _assert_close(output, expected, "output")
    grads = (torch.autograd.grad(t, tensors, grad_out) for t in (output, expected))
    for name, *pair in zip(GIVEN, *grads, strict=True):
        _assert_close(*pair, name)
    if running is None:
        _, mean, cov = definition(tensors[0].detach(), whitening)
        _assert_close(moments.mean, mean, "mean")
        _assert_close(moments.cov, cov, "cov")
        assert moments.elements == output.numel() // 4 and not (moments.mean.requires_grad or moments.cov.requires_grad)


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_first_and_second_derivative(mode, method, name):
    tensors = _tensors((3, 3, 2, 2))
    whitening, running = Whitening(method, 3, 3, 0.05), None
    if mode == "evaluation":
        running = JointMoments(*definition(correlated(50, 3, seed=7), whitening)[1:], 0)

    def function(*tensors):
        call = _call(list(tensors), running is None, "silu", running)
        return whiten(call, whitening, running, name)[0]

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_far_from_zero(backend, layout):
    """mean 1e4 and std 1e-2 in float32: what is whitened are the elements as they are, not their mean's rounding."""
    x = (correlated(8, 4, 5, 3) * 1e-2 + 1e4).float().contiguous(memory_format=layout).requires_grad_()
    grad_out = normal(*x.shape, seed=4)
    whitening = Whitening("zca", 1, 4, 1e-9)
    output, moments = whiten(_call([x, None, None, None]), whitening, backend=backend)
    exact = x.detach().double().requires_grad_()
    expected, mean, cov = definition(exact, whitening)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_out)
    (grad,) = torch.autograd.grad(output, x, grad_out.float())
    # Elements less their mean are exact except for a rounding of float32, and 120 of them are added up in float32 with
    # errors of some 4 spacings. Whitening multiplies that by the condition number of the covariance.
    unit = torch.finfo(torch.float32).eps
    condition = torch.linalg.cond(cov[0].detach()).item()
    assert 4 < condition < 100
    allowed = 4 * unit * condition
    torch.testing.assert_close(moments.mean, mean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.cov, cov.detach(), rtol=0, atol=4 * unit * cov.abs().max().item())
    if backend != "torch":  # the variances are batch normalisation's, to less than a spacing of float32
        diagonals = (each.detach().diagonal(dim1=-2, dim2=-1) for each in (moments.cov, cov))
        torch.testing.assert_close(*diagonals, rtol=3e-8, atol=0)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=allowed * expected.abs().max().item())
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=allowed * expected_grad.abs().max().item())
    assert output.is_contiguous(memory_format=layout)
    assert backend == "torch" or grad.is_contiguous(memory_format=layout)  # where torch's autograd decides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_half_types_beside_float32_parameters(backend, layout, dtype):
    tensors = _tensors((2, 4, 3, 5), torch.float32)
    tensors[:2] = [t.detach().to(dtype).contiguous(memory_format=layout).requires_grad_() for t in tensors[:2]]
    grad_out = normal(2, 4, 3, 5, seed=4).to(dtype)
    whitening = Whitening("iternorm", 5, 2, EPS)
    output, _ = whiten(_call(tensors), whitening, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = _expected(exact, whitening, None)
    grads = torch.autograd.grad(output, tensors, grad_out)
    # Everything is float32 but the rounding of the result, and that of z before the residual is added.
    unit = torch.finfo(dtype).eps
    for name, actual, right in zip(
        ("output", *GIVEN),
        (output, *grads),
        (expected, *torch.autograd.grad(expected, exact, grad_out.double())),
        strict=True,
    ):
        of_sum = name in ("weight", "bias")
        assert actual.dtype == (torch.float32 if of_sum else dtype)
        # The gradient of the input is the sum of two such results.
        allowed = (1e-5 if of_sum else 2 * unit) * right.abs().max().item()
        torch.testing.assert_close(actual.double(), right, rtol=0, atol=allowed, msg=lambda t, n=name: f"{n}: {t}")
    assert output.is_contiguous(memory_format=layout)
    assert backend == "torch" or grads[0].is_contiguous(memory_format=layout)


def test_autocast_makes_no_half_types_of_matrices():
    tensors = _tensors((2, 4, 3, 5), torch.float32)
    whitening = Whitening("iternorm", 5, 4, EPS)
    plain, _ = whiten(_call(tensors), whitening)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = whiten(_call(tensors), whitening)
        grads = torch.autograd.grad(output.sum(), tensors)
    assert output.dtype == torch.float32 and torch.equal(output, plain)
    for actual, expected in zip(grads, torch.autograd.grad(plain.sum(), tensors), strict=True):
        assert torch.equal(actual, expected)


def test_what_is_kept_for_backward():
    """The input, and of what autograd keeps nothing else that has the size of the input."""
    tensors, kept = _tensors((64, 4, 8, 8), torch.float32), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        whiten(_call([tensors[0], None, *tensors[2:]]), Whitening("iternorm", 5, 4, EPS), backend="cpu")
    large = [pointer for pointer, size in kept.items() if size > 64 * 4 * 8 * 8]
    assert large == [tensors[0].data_ptr()]


def test_backends_are_named_as_elsewhere():
    with pytest.raises(ValueError, match="backend: expected one of"):
        whiten(_call(_tensors((9, 4))), Whitening("zca", 1, 4, EPS), backend="none")
    with pytest.raises(ValueError, match="method: expected one of iternorm, zca, pca, got 'cholesky'"):
        whiten(_call(_tensors((9, 4))), Whitening("cholesky", 1, 4, EPS))
    assert set(BACKENDS) <= {*registry.names(), "emulator"}
