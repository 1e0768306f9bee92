"""Tools that look into the layer see torch's own batch_norm: export, tracing, functorch, forward-mode AD."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastbn
from tests.stock import SHAPES, assert_same_buffers, normal, pair


def _targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, training):
    stock, fast = pair()
    fast.activation = "relu"
    x, residual = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    fast.train(training), stock.train(training)
    program = torch.export.export(fast, (x, residual), strict=strict)
    targets = _targets(program)
    assert not any("fastbn" in target for target in targets), targets
    assert targets.count("aten.batch_norm.default") == 1 and "aten.relu.default" in targets
    torch.testing.assert_close(program.module()(x, residual), (stock(x) + residual).relu())
    decomposed = _targets(program.run_decompositions())
    assert any("native_batch_norm_legit" in target for target in decomposed), decomposed


def test_export_has_the_nodes_of_torchs_module():
    """Passes that match those nodes, such as the ONNX exporter, find them."""
    stock, fast = pair()
    x = normal(*SHAPES[2])
    programs = [torch.export.export(module.eval(), (x,)) for module in (stock, fast)]
    assert _targets(programs[0]) == _targets(programs[1]) == ["aten.batch_norm.default"]


def test_export_over_a_dynamic_batch():
    stock, fast = pair()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fast.eval(), (normal(*SHAPES[2]),), dynamic_shapes=({0: batch},))
    x = normal(9, *SHAPES[2][1:])
    torch.testing.assert_close(program.module()(x), stock.eval()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*:Warning")
def test_jit_trace():
    stock, fast = pair()
    x = normal(*SHAPES[2])
    traced = torch.jit.trace(fast.eval(), x)
    assert "aten::batch_norm" in str(traced.inlined_graph) and "fastbn::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x + 1), stock.eval()(x + 1))


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_vmap_without_running_statistics(randomness):
    x = normal(4, *SHAPES[2])
    results = [torch.vmap(module, randomness=randomness)(x) for module in pair(track_running_stats=False)]
    torch.testing.assert_close(*results)


def test_vmap_in_eval():
    x = normal(4, *SHAPES[2])
    torch.testing.assert_close(*(torch.vmap(module.eval())(x) for module in pair()))


def test_what_left_a_transform_that_is_over():
    """Its wrapper is dead, and the gradient reaches the tensor inside."""
    grads = []
    for module in pair():
        left, x = [], normal(*SHAPES[2]).requires_grad_()
        torch.func.grad(lambda x, left=left: (left.append(x * 2), x.sum())[1])(x)
        grads.append(torch.autograd.grad(module(left[0]).pow(3).sum(), (x, module.weight)))
    torch.testing.assert_close(grads[1], grads[0])


def test_vmap_with_running_statistics_fails_as_torchs():
    x = normal(4, *SHAPES[2])
    errors = []
    for module in pair():
        with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place") as caught:
            torch.vmap(module)(x)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and module.num_batches_tracked.item() == 2


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).pow(3).sum()),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).pow(3).sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.square(),))[1],
    "per_sample_grad": lambda f: torch.vmap(torch.func.grad(lambda row: f(row.expand(2, -1, -1, -1)).pow(3).sum())),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_functorch(name, training):
    x = normal(2, 5, 2, 2)
    stock, fast = pair(track_running_stats=not training)
    results = [TRANSFORMS[name](module.train(training))(x) for module in (stock, fast)]
    torch.testing.assert_close(*results)


def test_functional_call_with_stacked_parameters():
    modules = [pair(track_running_stats=False) for _ in range(3)]
    x, results = normal(*SHAPES[2]), []
    for kind in (0, 1):
        ensemble = [pair[kind] for pair in modules]
        parameters, buffers = torch.func.stack_module_state(ensemble)
        call = functools.partial(torch.func.functional_call, ensemble[0])
        results.append(torch.vmap(lambda p, b, call=call: call((p, b), (x,)))(parameters, buffers))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode(training):
    results = []
    stock, fast = pair()
    for module in (stock.train(training), fast.train(training)):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(normal(*SHAPES[2]), normal(*SHAPES[2], seed=1))
            results.append(forward_ad.unpack_dual(module(x)))
    torch.testing.assert_close(results[1].primal, results[0].primal)
    torch.testing.assert_close(results[1].tangent, results[0].tangent)
    assert_same_buffers(fast, stock)


def test_wrapper_subclasses_get_torchs_op():
    from torch.testing._internal.two_tensor import TwoTensor

    stock, fast = pair(affine=False, track_running_stats=False)
    x = TwoTensor(normal(*SHAPES[2]), normal(*SHAPES[2], seed=1))
    expected, actual = stock(x), fast(x)
    assert type(actual) is TwoTensor
    torch.testing.assert_close(actual.a, expected.a)
    torch.testing.assert_close(actual.b, expected.b)


def test_plain_subclasses_stay():
    class Tagged(torch.Tensor):
        pass

    bn = fastbn.BatchNorm2d(5)
    x = torch.randn(SHAPES[2]).as_subclass(Tagged)
    assert type(bn(x)) is type(nn.BatchNorm2d(5)(x)) is Tagged
    torch.testing.assert_close(bn(x).as_subclass(torch.Tensor), nn.BatchNorm2d(5)(x).as_subclass(torch.Tensor))
