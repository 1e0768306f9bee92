"""AccumulatedBatchNorm1d, 2d and 3d and fastbn.accumulate against the formulas in float64 and against BatchNorm."""

from __future__ import annotations

import contextlib
import copy
import pickle
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbn
from fastbn.autograd import statistics
from fastbn.autograd.statistics import Settings
from fastbn.backends import registry
from fastbn.backends.reference.formulas import wide
from fastbn.functional import channel_stats, merge_stats
from fastbn.nn.accumulated import _MicroBatch
from fastbn.ops.activations import index as activation_index
from fastbn.testing import assert_close_to_reference, tolerance
from tests import implementations
from tests.stock import CHANNELS, assert_same, assert_same_buffers, normal, pair, step

ACCUMULATED = {1: fastbn.AccumulatedBatchNorm1d, 2: fastbn.AccumulatedBatchNorm2d, 3: fastbn.AccumulatedBatchNorm3d}
SHAPES = {1: (9, CHANNELS), 2: (6, CHANNELS, 4, 6), 3: (5, CHANNELS, 3, 4, 3)}
SIZES = {1: (4, 3, 2), 2: (1, 3, 2), 3: (2, 2, 1)}  # of micro-batches
BACKENDS = ("reference", "cpu", "emulator", "triton")


def _layer(dim=2, **options):
    """Return a layer, and a BatchNorm with the same state, none of it at its initial value."""
    layer = ACCUMULATED[dim](CHANNELS, dtype=torch.float64, **options)
    stock, _ = pair(dim, momentum=layer.momentum)
    layer.load_state_dict(stock.state_dict())
    return layer, stock


def _micro_batches(dim):
    x = normal(*SHAPES[dim])
    return x + torch.arange(float(len(x))).view(-1, *[1] * (x.dim() - 1)) / 5, SIZES[dim]


def _expected(parts, grad_outs, weight, bias, residuals, activation, eps=1e-5):
    """Return outputs and gradients of all micro-batches by the formulas of the module."""
    results = []
    for k, (x, g) in enumerate(zip(parts, grad_outs, strict=True)):
        seen = torch.cat([part.detach() for part in parts[: k + 1]])
        dims = [dim for dim in range(x.dim()) if dim != 1]
        inv_std = wide(x, (seen.var(dims, correction=0) + eps).rsqrt())
        xhat = (x.detach() - wide(x, seen.mean(dims))) * inv_std
        z = (xhat * wide(x, weight) + wide(x, bias) + residuals[k]).detach().requires_grad_()
        output = z if activation is None else getattr(F, activation)(z)
        (grad_z,) = torch.autograd.grad(output, z, g)
        mean = lambda t, dims=dims: t.mean(dims, keepdim=True)  # noqa: E731
        own = (x.detach() - mean(x.detach())) * wide(x, (x.detach().var(dims, correction=0) + eps).rsqrt())
        grad_x = (grad_z - mean(grad_z) - own * mean(grad_z * own)) * wide(x, weight) * inv_std
        results.append((output, grad_x, grad_z, (grad_z * xhat).sum(dims), grad_z.sum(dims)))
    return [[value.detach() for value in result] for result in results]


@pytest.fixture(params=[pytest.param(name, marks=implementations.marks(name)) for name in BACKENDS])
def backend(request):
    if request.param in ("emulator", "triton"):
        implementations.load(request.param)
    return registry.get(request.param)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dim", SHAPES)
def test_the_formulas_on_every_backend(backend, dim, activation):
    x, sizes = _micro_batches(dim)
    grad_outs, residuals = (normal(*SHAPES[dim], seed=seed).split(sizes) for seed in (1, 2))
    weight, bias = (normal(CHANNELS, seed=seed).requires_grad_() for seed in (3, 4))
    parts = [part.detach().requires_grad_() for part in x.split(sizes)]
    expected = _expected(parts, grad_outs, weight, bias, residuals, activation)
    moments = None
    for part, residual, grad_out, right in zip(parts, residuals, grad_outs, expected, strict=True):
        residual.requires_grad_()
        hooks = _MicroBatch(moments, part.numel() // CHANNELS, 1e-5)
        settings = Settings(hooks, 1e-5, activation_index(activation), None, backend)
        output, moments = statistics.batch_norm(part, residual, weight, bias, settings)
        grads = torch.autograd.grad(output, (part, residual, weight, bias), grad_out)
        for actual, value in zip((output, *grads), right, strict=True):
            # A sum over at most 72 elements of products of about 1.
            allowed = tolerance.sum_tolerance(torch.float64, 72, 2 * 72.0).item()
            torch.testing.assert_close(actual, value, rtol=0, atol=allowed)


@pytest.mark.parametrize("momentum", [0.3, None, 0.0])
@pytest.mark.parametrize("dim", SHAPES)
def test_running_statistics_are_those_of_the_whole_batch(dim, momentum):
    layer, stock = _layer(dim, momentum=momentum)
    x, sizes = _micro_batches(dim)
    for scale in (1, 3):  # two steps
        before = copy.deepcopy(dict(layer.named_buffers()))
        for part in (x * scale).split(sizes):
            layer(part)
            assert_same(dict(layer.named_buffers()), before, rtol=0, atol=0)
        stock(x * scale)
        layer.finish()
        assert_same_buffers(layer, stock)
        assert layer.moments is None
    layer.finish()  # without a forward nothing moves
    layer(x)
    layer.discard()
    layer.finish()
    assert_same_buffers(layer, stock)


@pytest.mark.parametrize("dim", SHAPES)
def test_one_micro_batch_and_evaluation_are_batch_norm(dim):
    layer, stock = _layer(dim)
    x, grad_out = normal(*SHAPES[dim]), normal(*SHAPES[dim], seed=1)
    assert_same(step(layer, x, grad_out), step(stock, x, grad_out))
    layer.finish()
    assert_same_buffers(layer, stock)
    layer.eval()
    assert_same(step(layer, x, grad_out), step(stock.eval(), x, grad_out))
    assert layer.moments is None


def test_the_last_micro_batch_is_normalised_by_the_whole():
    layer = fastbn.AccumulatedBatchNorm2d(CHANNELS, affine=False, dtype=torch.float64)
    x, sizes = _micro_batches(2)
    outputs = [layer(part) for part in x.split(sizes)]
    whole = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(outputs[-1], whole[-sizes[-1] :])
    assert not torch.allclose(outputs[0], whole[: sizes[0]])
    for actual, expected in zip(layer.moments, channel_stats(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_forwards_before_backwards():
    """The gradient of each micro-batch is the same, whether its backward comes before the next forward or after all."""
    x, sizes = _micro_batches(2)
    grads = []
    for late in (False, True):
        layer, _ = _layer()
        parts = [part.detach().requires_grad_() for part in x.split(sizes)]
        outputs = []
        for part in parts:
            outputs.append(layer(part).square().sum())
            if not late:
                outputs.pop().backward()
        for output in outputs:
            output.backward()
        grads.append([part.grad for part in parts] + [layer.weight.grad])
    for early, late in zip(*grads, strict=True):
        assert torch.equal(early, late)


def test_an_empty_micro_batch():
    layer, stock = _layer()
    x, _ = _micro_batches(2)
    empty = x[:0].requires_grad_()
    for part in (empty, x[:2], empty, x[2:]):
        (grad,) = torch.autograd.grad(layer(part).sum(), part) if part is empty else (layer(part)[:0],)
        assert grad.shape == empty.shape
    layer.finish()
    stock(x)
    assert_same_buffers(layer, stock)
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer(empty)
    layer.finish()
    before["num_batches_tracked"] += 1
    assert_same(dict(layer.named_buffers()), before)


def test_what_it_has_seen_is_no_state():
    layer, stock = _layer()
    x, sizes = _micro_batches(2)
    first, *rest = x.split(sizes)
    layer(first)
    assert list(layer.state_dict()) == list(stock.state_dict())
    copies = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    stock(x)
    for other in copies:
        for part in rest:
            other(part)
        other.finish()
        assert_same_buffers(other, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_beside_float32_parameters(dtype):
    x, sizes = _micro_batches(2)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    layer, exact = _layer()[0].float(), _layer()[0].float()
    for part in x.split(sizes):
        output, expected = layer(part), exact(part.float())
        assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    # Both compute in float32 from the same elements; the output is then rounded to the nearest of its dtype.
    count, scale = x.numel() // CHANNELS, expected.abs().max().item()
    allowed = tolerance.forward_tolerance(torch.float32, count, scale) + tolerance.ulp(dtype, expected) / 2
    assert_close_to_reference(output, expected.double(), allowed, "output")


def test_compiled_it_is_one_graph():
    x, sizes = _micro_batches(2)
    layer, other = _layer(activation="relu")[0], _layer(activation="relu")[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for part in x.split(sizes):
        actual = step(compiled, part, part)
        assert_same({name.replace("_orig_mod.", ""): value for name, value in actual.items()}, step(other, part, part))
    layer.finish()
    other.finish()
    assert_same_buffers(layer, other)


def test_calls_that_are_refused():
    layer, _ = _layer()
    x = normal(*SHAPES[2])
    layer(x)
    moments = layer.moments
    for arguments, message in (
        ((x[0],), r"expected 4D input \(got 3D input\)"),
        ((x[:1, :, :1, :1],), "there is but one value a channel"),
        ((x, x[:1]), "expected residual of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    with pytest.raises(RuntimeError, match="expected no forward within a backward, as activation checkpointing"):
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert merge_stats(moments, channel_stats(x)).elements.item() == layer.moments.elements.item()
    with pytest.raises(TypeError, match="torch.jit.script: expected layers with a form in TorchScript"):
        torch.jit.script(layer)


def test_there_is_no_second_derivative():
    layer, _ = _layer()
    x = normal(*SHAPES[2]).requires_grad_()
    layer(x.detach())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def _network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, 4, 3)]
    return nn.Sequential(*layers, fastbn.BatchNorm2d(4, activation="relu")).double()


@pytest.mark.parametrize("converted", [False, True], ids=["", "converted"])
def test_within_accumulate_a_model_moves_once(converted):
    model, whole = _network(), _network()
    if converted:
        fastbn.convert(model)
    classes = [type(module) for module in model.modules()]
    x = normal(6, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with fastbn.accumulate(model) as same:
        assert same is model
        for part in x.split((1, 3, 2)):
            model(part).sum().backward()
            assert_same(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    whole(x)
    assert_same_buffers(model[1], whole[1])  # the input of the first layer depends on no other
    assert model[4].num_batches_tracked == 1 and not torch.equal(model[4].running_var, before["4.running_var"])
    assert [type(module) for module in model.modules()] == classes
    assert not any("moments" in vars(module) for module in model.modules())


def test_fused_forwards_stay_fused_within_accumulate():
    fused, plain = fastbn.convert(_network()), fastbn.convert(_network(), fuse=False)
    x = normal(6, 3, 8, 8)
    results = []
    for model in (fused, plain):
        with fastbn.accumulate(model):
            results.append([model(part) for part in x.split(3)])
        results[-1].append(_names(results[-1][0].grad_fn))
    assert "ReluBackward0" in results[1][-1] and "ReluBackward0" not in results[0][-1]
    for actual, expected in zip(results[0][:-1], results[1][:-1], strict=True):
        torch.testing.assert_close(actual, expected)


def _names(node):
    return [] if node is None else [node.name(), *(name for next, _ in node.next_functions for name in _names(next))]


def test_the_worked_example():
    """The numbers of docs/variants.md."""
    batches = torch.tensor([[0.0], [2]]), torch.tensor([[4.0], [6], [8], [10]])
    accumulated, plain, whole = (nn.BatchNorm1d(1).double() for _ in range(3))
    with fastbn.accumulate(accumulated):
        for batch in batches:
            accumulated(batch.double())
            plain(batch.double())
    whole(torch.cat(batches).double())
    for layer, mean, var in ((accumulated, 0.5, 2.3), (whole, 0.5, 2.3), (plain, 0.79, 0.99 + 2 / 3)):
        assert (layer.running_mean.item(), layer.running_var.item()) == pytest.approx((mean, var))


@pytest.mark.slow
def test_the_table_of_measured_errors():
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "variants.md").read_text()
    rows = runpy.run_path(str(docs / "accumulated.py"))["rows"](depths=(1, 3))  # the third takes longest
    assert len(rows) == 6 and [row for row in rows if row not in page] == []


@pytest.mark.slow
def test_a_model_that_was_compiled_before():
    models = [fastbn.convert(_network()) for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    x, results = normal(6, 3, 8, 8), []
    for model, call in ((models[0], compiled), (models[1], models[1])):
        results.append([call(x)])
        for _ in range(2):
            with fastbn.accumulate(model):
                results[-1] += [call(part) for part in x.split(2)]
            results[-1].append(call(x))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert_same(dict(models[0].named_buffers()), dict(models[1].named_buffers()))


def test_an_exception_within_accumulate_moves_nothing():
    model = _network()
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ZeroDivisionError):
        with fastbn.accumulate(model):
            model(normal(6, 3, 8, 8))
            raise ZeroDivisionError
    assert_same(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert [type(module) for module in model.modules()] == classes
    with fastbn.accumulate(model):  # the next step sees nothing of it
        model(normal(6, 3, 8, 8, seed=1))
    whole = _network()
    whole(normal(6, 3, 8, 8, seed=1))
    assert_same_buffers(model[1], whole[1])


def test_what_accumulate_leaves_alone():
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), fastbn.BatchRenorm1d(2), fastbn.AccumulatedBatchNorm1d(2))
    with fastbn.accumulate(model):
        for seed in range(3):
            model(normal(4, 2, seed=seed, dtype=torch.float32))
        assert [module.num_batches_tracked.item() for module in model] == [0, 3, 0]
    assert [module.num_batches_tracked.item() for module in model] == [0, 3, 1]
    assert type(model[2]) is fastbn.AccumulatedBatchNorm1d


def test_models_that_accumulate_refuses():
    model = fastbn.checkpoint_safe(_network())
    with pytest.raises(ValueError, match="expected layers without fastbn.checkpoint_safe, got one at 1"):
        with fastbn.accumulate(model):
            pass
    with pytest.raises(TypeError, match="accumulate: expected a torch.nn.Module, got str"):
        with fastbn.accumulate("model"):
            pass


def test_a_class_that_is_given_within_accumulate_stays():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    with fastbn.accumulate(model):
        model(normal(4, 2, dtype=torch.float32))
        model[0].__class__ = fastbn.FrozenBatchNorm1d
    assert [type(module) for module in model] == [fastbn.FrozenBatchNorm1d, nn.BatchNorm1d]
    assert [module.num_batches_tracked.item() for module in model] == [0, 1]
    assert not any("moments" in vars(module) for module in model)


@pytest.mark.parametrize("transform", [fastbn.convert, fastbn.revert, fastbn.freeze, fastbn.accumulate])
def test_what_is_refused_within_accumulate(transform):
    model = _network()
    x = normal(6, 3, 8, 8)
    with fastbn.accumulate(model):
        model(x)
        for part, name in ((model, "1"), (model[1], r"\(the model itself\)")):
            with pytest.raises(
                ValueError, match=f"expected layers outside of fastbn.accumulate, got one in it at {name}"
            ):
                with contextlib.ExitStack() as stack:
                    stack.enter_context(transform(part))
    assert model[1].num_batches_tracked == 1 and type(model[1]) is nn.BatchNorm2d and model[1].weight.requires_grad
    fastbn.freeze(fastbn.convert(model))  # they are free again
    assert type(model[1]) is fastbn.FrozenBatchNorm2d


def test_a_copy_made_within_accumulate_is_free():
    model = _network()
    with fastbn.accumulate(model):
        copied = copy.deepcopy(model)
        with fastbn.accumulate(copied):
            copied(normal(6, 3, 8, 8))
    assert (model[1].num_batches_tracked, copied[1].num_batches_tracked) == (0, 1)
