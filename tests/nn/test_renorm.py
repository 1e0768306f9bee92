"""fastbn.BatchRenorm1d, 2d and 3d against the paper's formulas in float64, and against BatchNorm where they meet."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fastbn
from fastbn.backends.reference.formulas import wide
from fastbn.nn import Ramp
from fastbn.testing import assert_close_to_reference, tolerance
from tests.stock import CHANNELS, SHAPES, assert_same, assert_same_buffers, normal, pair, step

RENORM = {1: fastbn.BatchRenorm1d, 2: fastbn.BatchRenorm2d, 3: fastbn.BatchRenorm3d}


def _layer(dim=2, **options):
    """Return a layer whose running statistics are those of some batches, and a BatchNorm with the same state."""
    layer = RENORM[dim](CHANNELS, dtype=torch.float64, **options)
    stock, _ = pair(dim, momentum=layer.momentum, eps=vars(layer)["eps"])
    layer.load_state_dict(stock.state_dict())
    return layer, stock


def _expected(layer, x, r_max, d_max):
    """Return the result of the paper's formulas, differentiable, with r and d as constants."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean, var = x.mean(dims), x.var(dims, correction=0)
    running_std = (layer.running_var + vars(layer)["eps"]).sqrt()
    r = ((var + vars(layer)["eps"]).sqrt() / running_std).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / running_std).clamp(-d_max, d_max).detach()
    xhat = (x - wide(x, mean)) / wide(x, (var + vars(layer)["eps"]).sqrt()) * wide(x, r) + wide(x, d)
    return xhat * wide(x, layer.weight) + wide(x, layer.bias)


@pytest.mark.parametrize("bounds", [(1.1, 0.2), (3.0, 5.0)], ids=["clipped", "wide"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dim", SHAPES)
def test_the_formulas_of_the_paper(dim, activation, bounds):
    layer, _ = _layer(dim, r_max=bounds[0], d_max=bounds[1], activation=activation)
    x, residual, grad_out = (normal(*SHAPES[dim], seed=seed) for seed in range(3))
    x, residual = (1.3 * x + 0.4).requires_grad_(), residual.requires_grad_()
    expected = _expected(layer, x, *bounds) + residual
    expected = expected if activation is None else getattr(F, activation)(expected)
    output = layer(x, residual)
    torch.testing.assert_close(output, expected)
    given = (x, residual, layer.weight, layer.bias)
    for grads in zip(*(torch.autograd.grad(t, given, grad_out) for t in (output, expected)), strict=True):
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dim", SHAPES)
def test_with_the_smallest_bounds_it_is_batch_norm(dim):
    layer, stock = _layer(dim, r_max=1, d_max=0)
    x, grad_out = normal(*SHAPES[dim]), normal(*SHAPES[dim], seed=1)
    assert_same(step(layer, x, grad_out), step(stock, x, grad_out))
    assert_same_buffers(layer, stock)


@pytest.mark.parametrize("dim", SHAPES)
def test_without_bounds_training_computes_what_evaluation_does(dim):
    layer, _ = _layer(dim, r_max=float("inf"), d_max=float("inf"))
    x = normal(*SHAPES[dim])
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("momentum", [0.3, None, 0.0])
def test_running_statistics_move_as_batch_norms(momentum):
    layer, stock = _layer(momentum=momentum)
    for seed in range(3):
        x = normal(*SHAPES[2], seed=seed)
        layer(x)
        stock(x)
        assert_same_buffers(layer, stock)
    layer.eval()
    assert_same(step(layer, x, x), step(stock.eval(), x, x))
    assert_same_buffers(layer, stock)


def test_an_empty_batch_only_counts():
    layer, stock = _layer()
    for module in (layer, stock):
        module(torch.zeros(0, CHANNELS, 4, 4, dtype=torch.float64))
    assert_same_buffers(layer, stock)


def test_schedules_follow_the_counter():
    seen = []

    def bound(batches):
        seen.append(batches)
        return torch.ones_like(batches)

    layer, _ = _layer(r_max=bound, d_max=Ramp(2, 4, 0.0, 1.0))
    limits = []
    for _ in range(3):
        x = normal(*SHAPES[2]) + 100
        xhat = (layer(x) - wide(x, layer.bias)) / wide(x, layer.weight)
        limits.append(xhat.mean((0, 2, 3)))
    assert [batch.item() for batch in seen] == [3, 4, 5] and seen[0].dtype == torch.float64
    for actual, expected in zip(limits, (0.5, 1.0, 1.0), strict=True):
        torch.testing.assert_close(actual, torch.full_like(actual, expected))
    resumed, _ = _layer(r_max=bound)
    resumed.load_state_dict(layer.state_dict())
    resumed(x)
    assert seen[-1].item() == 6


def test_ramp():
    ramp = Ramp(10, 20, 1.0, 3.0)
    batches = torch.tensor([0, 10, 15, 20, 99], dtype=torch.float64)
    assert ramp(batches).tolist() == [1, 1, 2, 3, 3]
    assert Ramp(5, 5, 0.0, 1.0)(batches).tolist() == [0, 1, 1, 1, 1]


def test_gradients_and_second_derivatives():
    """r and d saturate, so that finite differences see constants, as autograd does."""
    layer, _ = _layer(1, r_max=1.0001, d_max=1e-4, activation="silu")
    layer.running_mean.fill_(-10)
    x, residual = (normal(4, CHANNELS, seed=seed).requires_grad_() for seed in (3, 4))

    def function(x, residual, weight, bias):
        values = {"weight": weight, "bias": bias}
        return torch.func.functional_call(copy.deepcopy(layer), values, (x, residual))

    given = (x, residual, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_it_works_with_what_surrounds_a_layer():
    layer, stock = _layer(r_max=Ramp(0, 9, 1.0, 3.0))
    assert list(layer.state_dict()) == list(stock.state_dict())
    x = normal(*SHAPES[2])
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    traced = fx.symbolic_trace(nn.Sequential(copy.deepcopy(layer)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    expected = layer(x)
    for other in (*copies, compiled, traced):
        torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(compiled.running_var, layer.running_var)
    model = nn.Sequential(layer)
    assert type(fastbn.convert(model)[0]) is type(fastbn.freeze(model)[0]) is fastbn.BatchRenorm2d
    assert "r_max=Ramp(begin=0, end=9, low=1.0, high=3.0), d_max=5.0" in repr(layer)


def test_vmap_and_jacobians_look_through_it():
    layer, _ = _layer(1)
    x = normal(3, 4, CHANNELS)
    frozen = lambda x: copy.deepcopy(layer)(x)  # noqa: E731
    jacobian = torch.func.jacrev(frozen)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(frozen, x[0]))


def test_inference_mode_records_nothing():
    layer, _ = _layer()
    x = normal(*SHAPES[2])
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
    with torch.inference_mode(), torch.enable_grad():
        output = layer(x)
    assert torch.equal(output, expected) and output.is_inference() and not output.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_beside_float32_parameters(dtype):
    layer, _ = _layer()
    layer.float()
    x = normal(*SHAPES[2]).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(layer)(x.float())
    output = layer(x)
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    # Both compute in float32 from the same elements; the output is then rounded to the nearest of its dtype.
    count, scale = x.numel() // CHANNELS, expected.abs().max().item()
    allowed = tolerance.forward_tolerance(torch.float32, count, scale) + tolerance.ulp(dtype, expected) / 2
    assert_close_to_reference(output, expected.double(), allowed, "output")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"r_max": 0.5}, "r_max: expected a number from 1 on, or a schedule, got 0.5"),
        ({"d_max": -1.0}, "d_max: expected a number from 0 on, or a schedule, got -1.0"),
        ({"r_max": float("nan")}, "r_max: expected a number from 1 on"),
        ({"activation": "nothing"}, "activation: expected one of"),
    ],
    ids=str,
)
def test_arguments_outside(options, message):
    with pytest.raises(ValueError, match=message):
        fastbn.BatchRenorm2d(3, **options)


def test_calls_that_are_refused_move_nothing():
    layer, _ = _layer()
    before = copy.deepcopy(dict(layer.state_dict()))
    x = normal(*SHAPES[2])
    for arguments, message in (
        ((x[0],), r"expected 4D input \(got 3D input\)"),
        ((x[:1, :, :1, :1],), "there is but one value a channel"),
        ((x.int(),), "no kernels for torch.int32"),
        ((x, x[:1]), "expected residual of shape"),
        ((x[:, :3],), "not a contiguous vector of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    layer.running_mean = None
    with pytest.raises(ValueError, match="expected running_mean, running_var and num_batches_tracked, got None"):
        layer(x)
    layer.running_mean = before["running_mean"]
    assert_same(dict(layer.state_dict()), before)
