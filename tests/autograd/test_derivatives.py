"""Derivatives of every order: numerical ones in float64, and those of the torch composition."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastbn
from fastbn.backends import reference
from fastbn.ops import contract
from fastbn.ops.activations import ACTIVATIONS
from tests import implementations
from tests.stock import normal

# The tests make thousands of calls on a few dozen elements.
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "2d": ((6, 3), torch.contiguous_format),
    "3d": ((2, 3, 4), torch.contiguous_format),
    "4d": ((2, 3, 2, 3), torch.contiguous_format),
    "5d": ((2, 2, 2, 1, 3), torch.contiguous_format),
    "channels_last": ((2, 3, 2, 3), torch.channels_last),
    "channels_last_3d": ((2, 2, 2, 1, 3), torch.channels_last_3d),
    "one_channel": ((3, 1, 2, 2), torch.contiguous_format),
}
AFFINE = ("both", "neither", "weight", "bias")


def _configurations():
    """Cross activations, residuals and modes, and layouts, modes and a few activations; affine options take turns."""
    chosen = set(itertools.product(ACTIVATIONS, (True, False), (True, False), ("4d",)))
    layouts = [layout for layout in SHAPES if layout != "4d"]
    chosen |= set(itertools.product(("none", "relu", "silu"), (True,), (True, False), layouts))
    turns = itertools.cycle(AFFINE)
    return [
        pytest.param(name, add, train, layout, affine, id=f"{name}-{add=:d}-{train=:d}-{layout}-{affine}")
        for (name, add, train, layout), affine in zip(sorted(chosen), turns)
    ]


@pytest.fixture(scope="module", params=["cpu", "reference", "emulator"])
def backend(request):
    if request.param == "emulator":
        implementations.load("emulator")
    return request.param


def _problem(activation, residual, training, layout, affine, backend):
    """Return a function of float64 tensors and the tensors; z goes beyond every kink of every activation."""
    shape, memory_format = SHAPES[layout]
    x = normal(*shape).contiguous(memory_format=memory_format)
    tensors = {"input": x}
    if residual:
        tensors["residual"] = normal(*shape, seed=1).contiguous(memory_format=memory_format)
    if affine in ("both", "weight"):
        tensors["weight"] = torch.linspace(3, 5, shape[1], dtype=torch.float64)
    if affine in ("both", "bias"):
        tensors["bias"] = torch.linspace(-1, 1, shape[1], dtype=torch.float64) + 0.3
    names = list(tensors)
    buffers = normal(shape[1], seed=4), normal(shape[1], seed=5).square() + 0.5

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return fastbn.functional.batch_norm(
            given.pop("input"),
            *(buffer.clone() for buffer in buffers),
            training=training,
            activation=activation,
            backend=backend,
            **given,
        )

    return function, [t.requires_grad_() for t in tensors.values()]


@pytest.mark.parametrize("activation,residual,training,layout,affine", _configurations())
def test_numerical_derivatives(backend, activation, residual, training, layout, affine):
    function, tensors = _problem(activation, residual, training, layout, affine, backend)
    # An emulated launch costs milliseconds, so gradcheck takes random directions there, not each axis.
    assert gradcheck(function, tensors, fast_mode=backend == "emulator")
    if backend != "emulator" or layout == "4d":
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "leaky_relu", "gelu", "elu"])
def test_third_derivatives(activation, residual, training):
    """The reference is plain operations: from the third derivative on, torch's batch_norm treats its saved statistics
    as constants.
    """
    function, tensors = _problem(activation, residual, training, "channels_last", "both", "cpu")

    def composition(x, *rest):
        *added, weight, bias = rest
        wide = lambda vector: vector.view(1, -1, 1, 1)  # noqa: E731
        mean, var = normal(3, seed=4), normal(3, seed=5).square() + 0.5
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        z = (x - wide(mean)) / wide(var + 1e-5).sqrt() * wide(weight) + wide(bias) + sum(added)
        return z if activation == "none" else getattr(F, activation)(z)

    results = []
    for f in (function, composition):
        derivatives, value = [], f(*tensors).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            derivatives += grads
            value = sum((g * (g + i)).mean() for i, g in enumerate(grads))
        results.append(derivatives)
    for actual, expected in zip(*results, strict=True):
        # Each order multiplies terms that cancel, so the tolerance is relative to the largest element.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_create_graph_gives_the_same_first_derivative(dtype):
    """The first derivative that can be differentiated again is another computation; both round to dtype."""
    x, residual = (normal(4, 3, 5, 5, seed=seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    weight = torch.ones(3, requires_grad=True)
    y = fastbn.functional.batch_norm(x, None, None, weight, training=True, residual=residual, activation="relu")
    grads = [
        torch.autograd.grad(y, [x, residual, weight], torch.ones_like(y), retain_graph=True, create_graph=create)
        for create in (False, True)
    ]
    assert [g.dtype for g in grads[1]] == [dtype, dtype, torch.float32]
    # The gradient of weight sums 100 terms of order 1, here in float32 and there in float64.
    torch.testing.assert_close(*grads, atol=16 * torch.finfo(torch.float32).eps * 100, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("trains_affine", [True, False], ids=["affine", "frozen_affine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_create_graph_keeps_the_memory_format(memory_format, training, trains_affine):
    """The gradient has the input's memory format, whatever that of grad_out."""
    x = normal(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    layer = fastbn.BatchNorm2d(3, dtype=torch.float64).train(training).requires_grad_(trains_affine)
    for other in (torch.contiguous_format, torch.channels_last):
        grad_out = normal(2, 3, 4, 5, seed=1).contiguous(memory_format=other)
        (grad,) = torch.autograd.grad(layer(x), x, grad_out, create_graph=True)
        assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_hessian_vector_products(activation):
    x, v = normal(3, 4, 5), normal(3, 4, 5, seed=1)

    def loss(batch_norm):
        def f(x):
            z = batch_norm(x)
            return (z**3).sum()

        return f

    fused = loss(lambda x: fastbn.functional.batch_norm(x, None, None, training=True, activation=activation))
    composed = loss(lambda x: getattr(F, activation or "hardtanh")(F.batch_norm(x, None, None, training=True)))
    if activation is None:
        composed = loss(lambda x: F.batch_norm(x, None, None, training=True))
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        torch.testing.assert_close(product(fused, x, v), product(composed, x, v))


def test_a_gradient_penalty_reaches_the_parameters():
    results = []
    for module in (torch.nn.BatchNorm2d(3).double(), fastbn.BatchNorm2d(3).double()):
        x = normal(4, 3, 5, 5).requires_grad_()
        (grad,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        grad.norm().backward()
        results.append([x.grad, module.weight.grad, module.bias.grad])
    torch.testing.assert_close(*results)


def _op_arguments():
    x, stats = normal(3, 4, 5), torch.ones(4, dtype=torch.float64)
    backward = (x, x, None, None, None, None, stats, stats)
    return {
        "batch_norm_train": (x, None, None, None, None, None, None, 0.1, 1e-5, 0, False),
        "batch_norm_eval": (x, None, None, None, stats, stats, 1e-5, 0),
        "batch_norm_frozen": (x, None, None, None, stats, stats, 1e-5, 0, False),
        "batch_norm_backward": (*backward, True, 0, True, True, True, True),
        "channel_stats": (x,),
        "normalize": (x, None, None, None, stats, stats, 0, False),
        "grad_sums": (*backward, 0),
        "input_grad": (*backward, None, None, None, 0, True),
    }


@pytest.mark.parametrize("op", contract.OPS)
def test_an_op_refuses_to_be_differentiated(op):
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in _op_arguments()[op]]
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"fastbn::{op} cannot be differentiated directly: use fastbn.functional"):
        getattr(torch.ops.fastbn, op)(*arguments)[0].sum().backward()
    with torch.no_grad():
        getattr(torch.ops.fastbn, op)(*arguments)


def test_formulas_of_the_activations_are_torchs():
    z = torch.linspace(-7, 7, 201, dtype=torch.float64).requires_grad_()
    for index, name in enumerate(ACTIVATIONS):
        if name != "none":
            (expected,) = torch.autograd.grad(getattr(F, name)(z).sum(), z)
            torch.testing.assert_close(reference.activation_grad(z.detach(), index), expected)


@pytest.mark.parametrize("save", ["input", "output"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_the_mode", ["nothing", "weight", "statistics"])
def test_inference_mode_records_nothing(of_the_mode, training, save):
    """Not even where gradients are enabled inside it: so it is with torch's operations."""
    results = []
    for batch_norm, options in ((fastbn.functional.batch_norm, {"save": save}), (F.batch_norm, {})):
        x, weight = normal(4, 3, 5).requires_grad_(), normal(3, seed=1).requires_grad_()
        statistics = [normal(3, seed=2), normal(3, seed=3).abs() + 1]
        with torch.inference_mode(), torch.enable_grad():
            if of_the_mode == "weight":
                weight = weight.clone()
            if of_the_mode == "statistics":
                statistics = [vector.clone() for vector in statistics]
            y = batch_norm(x, *statistics, weight, training=training, **options)
        assert y.is_inference() and not y.requires_grad
        results.append((y, *statistics))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
