"""channel_stats, merge_stats and normalize of fastbn.functional against float64 computations over all data at once."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastbn import functional
from fastbn.backends import registry
from fastbn.functional import Moments, channel_stats, merge_stats, normalize
from fastbn.testing import tolerance
from tests import implementations
from tests.stock import normal

BACKENDS = ("reference", "cpu", "emulator", "triton", "torch")
SHAPES = [(6, 5), (4, 3, 7), (3, 5, 4, 6), (2, 3, 2, 3, 4)]
NAMES = "mean", "var", "elements"


@pytest.fixture(params=[pytest.param(name, marks=implementations.marks(name)) for name in BACKENDS])
def backend(request):
    if request.param in ("emulator", "triton"):
        implementations.load(request.param)
    return request.param


def _expected(x):
    """Return the moments of a tensor by their definition in float64."""
    rows = x.detach().double().transpose(0, 1).flatten(1)
    mean = rows.sum(1) / rows.shape[1]
    deviation = rows - mean[:, None]
    return Moments(mean, deviation.square().sum(1) / rows.shape[1], torch.tensor([rows.shape[1]]).double())


def _assert_same(actual, expected, **bounds):
    for name, value, right in zip(NAMES, actual, expected, strict=True):
        assert value.dtype == torch.float64 and value.shape == right.shape, name
        torch.testing.assert_close(value, right, msg=lambda text, name=name: f"{name}: {text}", **bounds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_of_a_tensor(backend, shape, dtype):
    x = normal(*shape, dtype=dtype).requires_grad_()
    moments = channel_stats(x, backend=backend)
    # Kernels add up some terms of about 1 in float32 before they go on in float64.
    _assert_same(moments, _expected(x), **({} if dtype == torch.float64 else {"rtol": 0, "atol": 2e-6}))
    assert not any(moment.requires_grad for moment in moments)


def test_moments_of_other_strides():
    x = normal(4, 6, 5, 7)[:, ::2, 1:]
    for view in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        _assert_same(channel_stats(view), _expected(view))


def test_moments_of_few_elements():
    one = normal(1, 3)
    _assert_same(channel_stats(one), Moments(one[0], torch.zeros(3).double(), torch.ones(1).double()))
    zeros = torch.zeros(3).double()
    _assert_same(channel_stats(one[:0]), Moments(zeros, zeros, torch.zeros(1).double()))


def test_moments_of_what_has_no_kernels():
    for input, reason in ((torch.ones(3, 2).int(), "no kernels for torch.int32"), (torch.ones(3), "two dimensions")):
        with pytest.raises(ValueError, match=f"channel_stats: cannot take this input: .*{reason}"):
            channel_stats(input)
    with pytest.raises(ValueError, match="backend: expected one of"):
        channel_stats(torch.ones(3, 2), backend="abacus")


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 0, 4), (0, 7), (2, 2, 1, 1, 1)], ids=str)
def test_parts_merge_to_the_whole(sizes):
    x = normal(sum(sizes), 3, 5) + torch.arange(float(sum(sizes))).view(-1, 1, 1)  # parts of different means
    parts = [channel_stats(part) for part in x.split(sizes)]
    for order in itertools.islice(itertools.permutations(parts), 6):
        _assert_same(merge_stats(*order), _expected(x))
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_stats(merged, part)
    _assert_same(merged, _expected(x))


def test_nothing_merges_to_exactly_the_rest():
    x = normal(5, 4, 3) * 0.1 + 1e3
    own = channel_stats(x)
    garbage = Moments(
        torch.full((4,), torch.nan).double(), torch.full((4,), torch.inf).double(), torch.zeros(1).double()
    )
    for parts in ((own,), (own, garbage), (garbage, own), (garbage, own, garbage)):
        assert all(torch.equal(a, b) for a, b in zip(merge_stats(*parts), own, strict=True))
    assert not any(moment.any() for moment in merge_stats(garbage, garbage))


def test_merging_far_from_zero():
    """mean 1e8, std 1: the difference of two large squares would have no digit left."""
    x = normal(40, 2) + 1e8
    merged, expected = merge_stats(*(channel_stats(part) for part in x.split(7))), _expected(x)
    # Float64 has a spacing of 1.5e-8 there: the means are rounded to it, and the variance has their squares.
    torch.testing.assert_close(merged.mean, expected.mean, rtol=0, atol=2 * 1.5e-8)
    torch.testing.assert_close(merged.var, expected.var, rtol=1e-7, atol=0)
    assert torch.equal(merged.elements, expected.elements)


def test_leading_shapes_and_counts_by_channel():
    mean, var = normal(2, 3, 4), normal(2, 3, 4, seed=1).square()
    elements = torch.tensor([[[1.0], [2], [0]], [[3], [0], [0]]]).double()
    parts = [Moments(*(value[k] for value in (mean, var, elements))) for k in range(2)]
    merged = merge_stats(*parts)
    assert merged.mean.shape == merged.var.shape == (3, 4) and merged.elements.shape == (3, 1)
    torch.testing.assert_close(merged.mean[0], mean[0, 0] / 4 + mean[1, 0] * 3 / 4)
    between = 3 / 16 * (mean[0, 0] - mean[1, 0]).square()  # n1 n2 / n^2
    torch.testing.assert_close(merged.var[0], var[0, 0] / 4 + var[1, 0] * 3 / 4 + between)
    assert torch.equal(merged.mean[1], mean[0, 1]) and not merged.mean[2].any() and not merged.var[2].any()
    by_channel = [Moments(part.mean, part.var, part.elements.expand(3, 4)) for part in parts]
    for actual, expected in zip(merge_stats(*by_channel), merged, strict=True):
        torch.testing.assert_close(actual, expected.expand(3, 4))


def test_merging_is_differentiable():
    def merged(*values):
        counts = torch.tensor([3.0]).double(), torch.tensor([5.0]).double()
        return merge_stats(Moments(*values[:2], counts[0]), Moments(*values[2:], counts[1]))[:2]

    values = [normal(3, seed=seed).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(merged, values)


def test_moments_that_do_not_go_together():
    a = channel_stats(normal(4, 3))
    with pytest.raises(ValueError, match="expected moments of at least one part, got none"):
        merge_stats()
    with pytest.raises(ValueError, match=r"expected mean of one shape, got \[\(3,\), \(5,\)\]"):
        merge_stats(a, channel_stats(normal(4, 5)))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalising_by_given_moments(backend, shape, activation):
    x, residual, grad_out = (normal(*shape, seed=seed) for seed in range(3))
    weight, bias = normal(shape[1], seed=3), normal(shape[1], seed=4)
    given = [t.requires_grad_() for t in (x, residual, weight, bias)]
    moments = channel_stats(normal(*shape, seed=5) + 0.5)
    output = normalize(x, moments, weight, bias, 1e-3, residual=residual, activation=activation, backend=backend)
    expected = F.batch_norm(x, moments.mean, moments.var, weight, bias, False, 0.0, 1e-3) + residual
    expected = expected if activation is None else getattr(F, activation)(expected)
    torch.testing.assert_close(output, expected)
    for grad, right in zip(*(torch.autograd.grad(t, given, grad_out) for t in (output, expected)), strict=True):
        # A sum over at most 72 elements of products of about 1.
        allowed = tolerance.sum_tolerance(torch.float64, 72, 2 * 72.0).item()
        torch.testing.assert_close(grad, right, rtol=0, atol=allowed)


def test_the_parts_make_batch_norm():
    x, weight = normal(5, 3, 4, 4), normal(3, seed=1)
    expected = functional.batch_norm(x, None, None, weight, None, True)
    merged = merge_stats(*(channel_stats(part) for part in x.split(2)))
    torch.testing.assert_close(torch.cat([normalize(part, merged, weight) for part in x.split(2)]), expected)


def test_normalising_leaves_moments_alone():
    moments = Moments(*(normal(3, seed=seed).square().float().requires_grad_() for seed in range(2)), torch.ones(1))
    x = normal(1, 3, 1, 1, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = normalize(x, moments, activation="leaky_relu", activation_param=0.2)
    assert output.dtype == torch.bfloat16 and output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert x.grad is not None and moments.mean.grad is None and moments.mean.requires_grad


def test_calls_of_normalize_that_are_refused():
    x, moments = normal(4, 3), channel_stats(normal(4, 3))
    for arguments, message in (
        ((x[:, :2], moments), r"expected mean of shape \[2\] on cpu, got \[3\] on cpu"),
        ((x.int(), moments), "normalize: cannot take this call: fastbn has no kernels for torch.int32"),
        ((x[0], moments), "at least two dimensions"),
        ((x, moments, x[0, :2]), "not a contiguous vector of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            normalize(*arguments)
    for options, message in (
        ({"residual": x[:1]}, "expected residual of shape"),
        ({"activation": "nothing"}, "activation: expected one of"),
        ({"backend": "abacus"}, "backend: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            normalize(x, moments, **options)


@pytest.mark.parametrize("name", [None, "cpu"])
def test_compiled_it_is_one_graph(name):
    assert name is None or registry.get(name)

    def whole(x, y):
        merged = merge_stats(channel_stats(x, backend=name), channel_stats(y, backend=name))
        return normalize(x, merged, activation="relu", backend=name)

    x, y = normal(4, 3, 8), normal(2, 3, 8, seed=1)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), whole(x, y))
