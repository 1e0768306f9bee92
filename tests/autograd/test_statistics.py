"""fastbn.autograd.statistics: each hook, by a variant of a few lines, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.autograd import statistics
from fastbn.autograd.statistics import Hooks, Moments, Settings
from fastbn.backends import registry
from fastbn.backends.reference.formulas import wide
from fastbn.ops.activations import index as activation_index
from fastbn.testing import cases, tolerance
from tests import implementations

EPS = 1e-3
BACKENDS = ("reference", "cpu", "emulator", "triton", "torch")
SHAPES = [(6, 5), (4, 3, 7), (3, 5, 4, 6), (2, 3, 2, 3, 4)]


@pytest.fixture(params=[pytest.param(name, marks=implementations.marks(name)) for name in BACKENDS])
def backend(request):
    if request.param in ("emulator", "triton"):
        implementations.load(request.param)
    return registry.get(request.param)


class Renormalised(Hooks):
    """r and d as clipped functions of the batch's moments (Ioffe 2017), which are constants."""

    def correct(self, moments):
        std = (moments.var + EPS).sqrt()
        return (std / 0.8).clamp(0.7, 1.4), ((moments.mean - 0.1) / 0.8).clamp(-0.5, 0.5)


class Masked(Hooks):
    def __init__(self, mask: Tensor, keeps_others: bool = False):
        self.mask, self.keeps_others = mask, keeps_others

    def select(self, input):
        return self.mask


class Frozen(Hooks):
    def __init__(self, mean: Tensor, var: Tensor):
        self.moments = Moments(mean.double(), var.double(), torch.ones(1, dtype=torch.float64))

    def replace(self):
        return self.moments


class OfTwoRanks(Hooks):
    """Moments merged by Chan's formula with those of another rank, whose sums of backward are given."""

    def __init__(self, others: Moments, sums: tuple[Tensor, Tensor]):
        self.others, self.sums = others, sums

    def merge(self, own):
        other, count = self.others, own.elements + self.others.elements
        mean = (own.mean * own.elements + other.mean * other.elements) / count
        squares = own.var * own.elements + other.var * other.elements
        squares = squares + (other.mean - own.mean).square() * own.elements * other.elements / count
        return Moments(mean, squares / count, count)

    def merge_sums(self, sum_grad, sum_grad_xhat):
        return sum_grad + self.sums[0], sum_grad_xhat + self.sums[1]


def _tensors(shape, dtype=torch.float64, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, r, g = (normal(*shape) * 0.7 + 0.3, normal(*shape) * 0.5, normal(*shape))
    weight, bias = normal(shape[1]) * 0.3 + 1, normal(shape[1]) * 0.3
    tensors = [x, r if residual else None, weight, bias]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors], g.to(dtype)


def _run(backend, hooks, tensors, grad_out, activation):
    settings = Settings(hooks, EPS, activation_index(activation), None, backend)
    output, moments = statistics.batch_norm(*tensors, settings)
    given = [t for t in tensors if t is not None]
    return output, moments, torch.autograd.grad(output, given, grad_out)


def _expected(tensors, grad_out, activation, mean=None, var=None, r=None, d=None, mask=None, keeps=False):
    """Return output and gradients by the definition, differentiated by autograd."""
    x, residual, weight, bias = tensors
    dims = [dim for dim in range(x.dim()) if dim != 1]
    if mean is None:
        chosen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
        count = chosen.sum(dims).clamp(min=1)
        mean = torch.where(chosen, x, 0.0).sum(dims) / count
        var = torch.where(chosen, (x - wide(x, mean)).square(), 0.0).sum(dims) / count
    xhat = (x - wide(x, mean)) / wide(x, (var + EPS).sqrt())
    if r is not None:
        xhat = xhat * wide(x, r.detach()) + wide(x, d.detach())
    z = xhat * wide(x, weight) + wide(x, bias)
    z = z if residual is None else z + residual
    output = z if activation is None else getattr(F, activation)(z)
    given = [t for t in tensors if t is not None]
    if mask is not None:
        output = torch.where(mask, output, x if keeps else 0.0)
    return output, torch.autograd.grad(output, given, grad_out)


def _assert_close(actual, expected):
    """Assert that two float64 results of one formula differ by rounding alone.

    Results are elements, or sums over a channel of at most 72 elements. The mean square of xhat is at most 1 and that
    of grad_out about 1, so the magnitudes of products of both add up to some 72, and to twice that with parameters.
    """
    allowed = tolerance.sum_tolerance(torch.float64, 72, 2 * 72.0).item()  # 7e-13
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed)


def _check(actual, expected):
    (output, _, grads), (expected_output, expected_grads) = actual, expected
    _assert_close(output, expected_output)
    for grad, right in zip(grads, expected_grads, strict=True):
        _assert_close(grad, right)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_hooks_it_is_batch_norm(backend, shape, residual, activation):
    tensors, grad_out = _tensors(shape, residual=residual)
    actual = _run(backend, Hooks(), tensors, grad_out, activation)
    _check(actual, _expected(tensors, grad_out, activation))
    x, moments = tensors[0], actual[1]
    dims = [dim for dim in range(x.dim()) if dim != 1]
    torch.testing.assert_close(moments.mean, x.detach().mean(dims))
    torch.testing.assert_close(moments.var, x.detach().var(dims, correction=0))
    assert moments.elements.item() == x.numel() // x.shape[1] and not any(t.requires_grad for t in moments)


@pytest.mark.parametrize("activation", [None, "leaky_relu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_corrected_normalisation(backend, shape, activation):
    tensors, grad_out = _tensors(shape)
    x = tensors[0].detach()
    dims = [dim for dim in range(x.dim()) if dim != 1]
    moments = Moments(x.mean(dims), x.var(dims, correction=0), torch.ones(1))
    r, d = Renormalised().correct(moments)
    actual = _run(backend, Renormalised(), tensors, grad_out, activation)
    _check(actual, _expected(tensors, grad_out, activation, r=r, d=d))


@pytest.mark.parametrize("activation", [None, "relu", "elu"])
@pytest.mark.parametrize("keeps", [False, True], ids=["zero", "keep"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selected_elements(backend, shape, keeps, activation):
    tensors, grad_out = _tensors(shape)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(3)) < 0.6
    others = ~mask.expand(shape)
    expected = _expected(tensors, grad_out, activation, mask=mask, keeps=keeps)
    kept = tensors[0][others].detach()
    with torch.no_grad():  # what padding holds must not matter
        tensors[0][others] = float("nan")
        tensors[1][others] = float("nan")
    output, moments, grads = _run(backend, Masked(mask, keeps), tensors, grad_out, activation)
    assert output[others].isnan().all() if keeps else not output[others].any()
    with torch.no_grad():
        output[others] = kept if keeps else 0.0
    _check((output, moments, grads), expected)


def test_moments_of_selected_elements_far_from_zero(backend):
    """mean 1e4 and std 1e-2 in float32: the variance is as exact as the data."""
    x = cases.make_normal(cases.Case("far", (8, 3, 50)), torch.float64) * 1e-2 + 1e4
    x = x.float()
    mask = torch.rand(8, 1, 50, generator=torch.Generator().manual_seed(1)) < 0.3
    settings = Settings(Masked(mask), EPS, 0, None, backend)
    _, moments = statistics.batch_norm(x, None, None, None, settings)
    chosen = x.double().transpose(0, 1)[:, mask.squeeze(1)]
    # The mean to 1e-6 of the standard deviation, the variance to less than a spacing of float32: sums are float64 or
    # promoted to it, and only elements, pivots and what fills the gaps are float32.
    torch.testing.assert_close(moments.mean, chosen.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.var, chosen.var(1, correction=0), rtol=1e-7, atol=0)
    assert moments.elements.item() == mask.sum().item()


@pytest.mark.parametrize("outlier", [1e6, float("inf"), float("nan")], ids=str)
def test_moments_of_selected_elements_with_outliers(backend, outlier):
    """A third of the elements are outliers in channel 0; channel 1 has none, and is as it would be without them."""
    x = cases.make_normal(cases.Case("outliers", (8, 2, 50)), torch.float64).float()
    x[:, 0, ::3] = outlier
    mask = torch.rand(8, 1, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    _, moments = statistics.batch_norm(x, None, None, None, Settings(Masked(mask), EPS, 0, None, backend))
    chosen = x.double().transpose(0, 1)[:, mask.squeeze(1)]
    mean, var = chosen.mean(1), chosen.var(1, correction=0)
    # Within 1e-6: the float32 sums of 400 terms, whose variance about the pivot is at most twice that about the mean.
    torch.testing.assert_close(moments.var, var, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(moments.mean[1], mean[1], rtol=0, atol=1e-6)
    assert moments.mean[0].isfinite() == mean[0].isfinite()


def test_the_moments_of_selected_elements_take_one_pass():
    x, mask = torch.randn(4, 3, 7), torch.rand(4, 1, 7) < 0.5
    settings = Settings(Masked(mask), EPS, 0, None, registry.get("cpu"))
    with torch.profiler.profile() as profile:
        statistics.batch_norm(x, None, None, None, settings)
    assert [event.name for event in profile.events()].count("fastbn::channel_stats") == 1


def test_nothing_selected(backend):
    tensors, grad_out = _tensors((3, 4, 5))
    output, moments, grads = _run(backend, Masked(torch.zeros(3, 1, 5, dtype=torch.bool)), tensors, grad_out, "relu")
    assert not moments.mean.any() and not moments.var.any() and moments.elements.item() == 0
    assert output.isfinite().all() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fixed"])
def test_replaced_moments(backend, trained, activation):
    tensors, grad_out = _tensors((3, 5, 4, 6))
    mean, var = torch.linspace(-1, 1, 5).double(), torch.linspace(0.5, 2, 5).double()
    tensors[2:] = [t.detach().requires_grad_(trained) for t in tensors[2:]]
    given = [t for t in tensors if t.requires_grad]
    settings = Settings(Frozen(mean, var), EPS, activation_index(activation), None, backend)
    output, _ = statistics.batch_norm(*tensors, settings)
    expected = F.batch_norm(tensors[0], mean, var, tensors[2], tensors[3], False, 0.1, EPS) + tensors[1]
    expected = expected if activation is None else getattr(F, activation)(expected)
    torch.testing.assert_close(output, expected)
    for grad, right in zip(*(torch.autograd.grad(t, given, grad_out) for t in (output, expected)), strict=True):
        _assert_close(grad, right)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("own", [4, 1, 0], ids="{} of 6".format)
def test_merged_moments(backend, own):
    """Two ranks hold parts of a batch, one of them perhaps nothing: each gets its part of the batch's gradient."""
    tensors, grad_out = _tensors((6, 5, 4, 3))
    output, grads = _expected(tensors, grad_out, "relu")
    x, residual, weight, bias = tensors
    parts = slice(None, own), slice(own, None)
    moments, sums = [], []
    for part in parts:
        mean = x[part].detach().mean((0, 2, 3)) if len(x[part]) else torch.zeros(5).double()
        var = x[part].detach().var((0, 2, 3), correction=0) if len(x[part]) else torch.zeros(5).double()
        moments.append(Moments(mean, var, torch.tensor([len(x[part]) * 12.0]).double()))
        batch = x.detach()
        xhat = (batch - wide(x, batch.mean((0, 2, 3)))) / wide(x, (batch.var((0, 2, 3), correction=0) + EPS).sqrt())
        grad_z = grads[1][part]
        sums.append((grad_z.sum((0, 2, 3)), (grad_z * xhat[part]).sum((0, 2, 3))))
    parameter_grads = []
    for rank, part in enumerate(parts):
        hooks = OfTwoRanks(moments[1 - rank], sums[1 - rank])
        local = [x[part].detach().requires_grad_(), residual[part].detach().requires_grad_(), weight, bias]
        actual = _run(registry.get(backend), hooks, local, grad_out[part], "relu")
        torch.testing.assert_close(actual[0], output[part])
        for grad, right in zip(actual[2][:2], grads[:2], strict=True):
            _assert_close(grad, right[part])
        parameter_grads.append(actual[2][2:])
    for total, right in zip(map(sum, zip(*parameter_grads, strict=True)), grads[2:], strict=True):
        _assert_close(total, right)


@pytest.mark.parametrize("variant", ["plain", "corrected", "selected", "kept", "replaced"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_first_and_second_derivative(name, activation, variant):
    if variant == "corrected":  # r and d are constants, which finite differences do not know
        constants = Renormalised().correct(Moments(torch.full((3,), 0.2).double(), torch.ones(3).double(), None))
        hooks = Hooks()
        hooks.correct = lambda moments: constants
    else:
        mask = torch.tensor([True, True, False, True]).view(4, 1)
        moments = torch.zeros(3).double(), torch.ones(3).double()
        kinds = {"plain": Hooks(), "selected": Masked(mask), "kept": Masked(mask, True), "replaced": Frozen(*moments)}
        hooks = kinds[variant]
    tensors, _ = _tensors((4, 3), seed=5)
    settings = Settings(hooks, EPS, activation_index(activation), None, registry.get(name))

    def function(*tensors):
        output, _ = statistics.batch_norm(*tensors, settings)
        return output

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_merged_moments_have_no_second_derivative():
    tensors, _ = _tensors((4, 3))
    zeros = torch.zeros(3).double()
    hooks = OfTwoRanks(Moments(zeros, zeros, torch.ones(1).double()), (zeros, zeros))
    output, _ = statistics.batch_norm(*tensors, Settings(hooks, EPS, 0, None, registry.get("cpu")))
    with pytest.raises(RuntimeError, match="merged moments cannot be differentiated twice"):
        torch.autograd.grad(output.sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formats_and_dtypes(backend, dtype):
    tensors, grad_out = _tensors((3, 5, 4, 6), dtype)
    tensors[0] = tensors[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    tensors[2:] = [t.detach().float().requires_grad_() for t in tensors[2:]]
    output, _, grads = _run(backend, Renormalised(), tensors, grad_out, "relu")
    assert output.dtype == grads[0].dtype == grads[1].dtype == dtype and grads[2].dtype == torch.float32
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (output, grads[0]))


def test_compiled_it_is_one_graph():
    tensors, grad_out = _tensors((3, 5, 4, 6), torch.float32)
    settings = Settings(Renormalised(), EPS, 1, None, registry.get("cpu"))
    eager = statistics.batch_norm(*tensors, settings)[0]
    compiled = torch.compile(lambda *t: statistics.batch_norm(*t, settings)[0], fullgraph=True, backend="aot_eager")
    output = compiled(*tensors)
    torch.testing.assert_close(output, eager)
    for grads in zip(*(torch.autograd.grad(t, tensors, grad_out) for t in (output, eager)), strict=True):
        torch.testing.assert_close(*grads)
