"""fastbn's modules behave as the installed torch's: buffers, modes, dtypes, layouts, gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import fastbn
from fastbn.backends import reference
from fastbn.testing import cases
from tests.stock import SHAPES, assert_same, assert_same_buffers, normal, pair, step

LAYOUTS = [((3, 6, 5, 4), layout) for layout in cases.LAYOUTS if layout != "channels_last_3d"]
LAYOUTS += [((2, 6, 3, 5, 4), "channels_last_3d"), ((2, 6, 3, 5, 4), "transposed"), ((12, 9), "transposed")]
MOMENTA = (-1.2, -1.0, 0.0, 0.1, 1.0, None)
AFFINE = [{"affine": True}, {"affine": False}]
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
    AFFINE.append({"bias": False})


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dim", SHAPES)
def test_buffers_follow_torch_over_steps(dim, momentum):
    stock, fast = pair(dim, momentum=momentum)
    for seed in range(3):
        x = normal(*SHAPES[dim], seed=seed) * 3 + 7
        assert_same(step(fast, x, x.square()), step(stock, x, x.square()))
        assert_same_buffers(fast, stock)
    assert fast.num_batches_tracked.item() == 5
    stock.eval(), fast.eval()
    assert_same(step(fast, x, x.square()), step(stock, x, x.square()))
    assert_same_buffers(fast, stock)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tracks", [True, False], ids=["tracks", "does_not_track"])
@pytest.mark.parametrize("options", AFFINE, ids=str)
@pytest.mark.parametrize("dim", SHAPES)
def test_options(dim, options, tracks, training):
    stock, fast = pair(dim, track_running_stats=tracks, **options)
    stock.train(training), fast.train(training)
    x, grad_out = normal(*SHAPES[dim]), normal(*SHAPES[dim], seed=1)
    assert_same(step(fast, x, grad_out), step(stock, x, grad_out))
    assert_same_buffers(fast, stock)


def test_flipping_track_running_stats_freezes_the_buffers_but_eval_uses_them():
    stock, fast = pair()
    x = normal(*SHAPES[2])
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    for module in (stock, fast):
        module.track_running_stats = False
    assert_same(step(fast, x, x), step(stock, x, x))
    assert_same(dict(fast.named_buffers()), before)
    stock.eval(), fast.eval()
    assert_same(step(fast, x, x), step(stock, x, x))
    mean, var = (before[name].view(1, -1, 1, 1) for name in ("running_mean", "running_var"))
    plain = (x - mean) / (var + fast.eps).sqrt() * fast.weight.view(1, -1, 1, 1) + fast.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(fast(x), plain)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_buffers_set_to_none_mean_batch_statistics(training):
    stock, fast = pair()
    for module in (stock, fast):
        module.running_mean = module.running_var = None
        module.train(training)
    x = normal(*SHAPES[2])
    assert_same(step(fast, x, x), step(stock, x, x))
    assert fast.num_batches_tracked.item() == stock.num_batches_tracked.item() == 2 + training


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_set_to_none_is_not_needed(momentum):
    stock, fast = pair(momentum=momentum)
    stock.num_batches_tracked = fast.num_batches_tracked = None
    x = normal(*SHAPES[2])
    assert_same(step(fast, x, x), step(stock, x, x))
    assert_same_buffers(fast, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_another_dtype_counts(momentum, dtype):
    stock, fast = pair(momentum=momentum)
    for module in (stock, fast):
        module.num_batches_tracked = module.num_batches_tracked.to(dtype)
    x = normal(*SHAPES[2])
    assert_same(step(fast, x, x), step(stock, x, x))
    assert_same_buffers(fast, stock)


@pytest.mark.parametrize("backend", [None, "cpu", "reference", "torch"])
def test_a_counter_given_in_evaluation_stays(backend):
    counter, mean, var = torch.tensor(3), normal(5), normal(5, seed=1).square()
    options = {"momentum": None, "num_batches_tracked": counter, "backend": backend}
    fastbn.functional.batch_norm(normal(3, 5), mean, var, **options)
    assert counter.item() == 3


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (3, 5, 0, 6)], ids=str)
def test_an_empty_batch_is_counted_and_leaves_the_averages(shape, training, momentum):
    stock, fast = pair(momentum=momentum)
    stock.train(training), fast.train(training)
    x = torch.empty(shape, dtype=torch.float64)
    assert_same(step(fast, x, x.clone()), step(stock, x, x.clone()))
    assert_same_buffers(fast, stock)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("same_parameters", [True, False], ids=["half_parameters", "float_parameters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype, same_parameters, training):
    stock, fast = pair(dtype=dtype if same_parameters else torch.float32)
    stock.train(training), fast.train(training)
    x, grad_out = normal(*SHAPES[2], dtype=dtype), normal(*SHAPES[2], seed=1, dtype=dtype)
    # Gradients are sums of 72 products of half numbers: stock's own are a few ulp off.
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    assert_same(step(fast, x, grad_out), step(stock, x, grad_out), **tolerance)
    assert_same_buffers(fast, stock, **tolerance)


def test_the_gradient_of_a_float_bias_alone_is_not_rounded_to_half():
    x = normal(512, 3, dtype=torch.bfloat16)
    bias = torch.zeros(3, requires_grad=True)
    grad_out = normal(512, 3, seed=1, dtype=torch.bfloat16) + 1
    fastbn.functional.batch_norm(x, None, None, None, bias, training=True).backward(grad_out)
    torch.testing.assert_close(bias.grad, grad_out.double().sum(0).float())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape,layout", LAYOUTS, ids=str)
def test_memory_format(shape, layout, training):
    """Output and gradient have the input's suggested format, whatever that of grad_out."""
    x = cases.make_input(cases.Case(layout, shape, layout), torch.float64).requires_grad_()
    stock, fast = pair(len(shape) - 2 or 1, channels=shape[1])
    stock.train(training), fast.train(training)
    expected, actual = stock(x), fast(x)
    assert actual.stride() == expected.stride()
    memory_format = reference.suggest_memory_format(x)
    grad_outs = [normal(*shape), normal(1, *shape[1:]).expand(shape)]
    if len(shape) > 3:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        grad_outs.append(normal(*shape).contiguous(memory_format=last))
    for grad_out in grad_outs:
        (grad,) = torch.autograd.grad(actual, x, grad_out, retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x, grad_out, retain_graph=True)[0])
        assert grad.is_contiguous(memory_format=memory_format)


def test_a_module_called_twice_before_backward():
    stock, fast = pair()
    results = []
    for module in (stock, fast):
        first, second = (normal(*SHAPES[2], seed=seed).requires_grad_() for seed in (1, 2))
        loss = module(first).square().sum() + (module(second) ** 3).sum()
        results.append(torch.autograd.grad(loss, [first, second, module.weight, module.bias]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_eval_forward_then_train_forward_then_backward(activation):
    """The gradient uses the statistics of its own forward pass. torch's uses the updated buffers instead."""
    stock, fast = pair()
    fast.activation = activation
    results = []
    for module in (stock, fast):
        x = normal(*SHAPES[2]).requires_grad_()
        frozen = module.eval()(x)
        if module is fast:
            module.train()(x + 1)
        elif activation:
            frozen = getattr(nn.functional, activation)(frozen)
        results.append(torch.autograd.grad(frozen.square().sum(), [x, module.weight, module.bias]))
    torch.testing.assert_close(results[1], results[0])


def test_the_version_of_the_buffers_stays():
    _, fast = pair()
    before = fast.running_mean._version, fast.running_var._version
    x = normal(*SHAPES[2]).requires_grad_()
    fast(x).sum().backward()
    with torch.no_grad():
        fast(x)
    fast.requires_grad_(False)(x.detach())
    assert (fast.running_mean._version, fast.running_var._version) == before
    assert fast.num_batches_tracked.item() == 5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight bias", "x bias", "x weight"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_partial_gradients(activation, wanted, training):
    stock, fast = pair()
    stock.train(training), fast.train(training)
    fast.activation = activation
    results = []
    for module in (stock, fast):
        tensors = {"x": normal(*SHAPES[2]), "weight": module.weight, "bias": module.bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted.split())
        output = module(tensors["x"])
        if module is stock and activation:
            output = getattr(nn.functional, activation)(output)
        results.append(torch.autograd.grad(output.square().sum(), [tensors[name] for name in wanted.split()]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype):
    stock, fast = pair(dtype=torch.float32)
    x = normal(*SHAPES[2], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = stock(x), fast(x)
    assert actual.dtype == expected.dtype == dtype
    assert_same_buffers(fast, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(training, mode):
    stock, fast = pair()
    stock.train(training), fast.train(training)
    with mode():
        x = normal(*SHAPES[2]).requires_grad_()
        expected, actual = stock(x), fast(x)
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad and actual.is_inference() == expected.is_inference()
    assert_same_buffers(fast, stock)


def test_the_output_may_be_changed_in_place():
    stock, fast = pair()
    x, grad_out = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    modules = [nn.Sequential(module, nn.ReLU(inplace=True)) for module in (fast, stock)]
    assert_same(*(step(module, x, grad_out) for module in modules))


def test_an_input_changed_before_backward_is_an_error():
    _, fast = pair()
    x = normal(*SHAPES[2]).requires_grad_()
    changed = x.clone()
    output = fast(changed)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_channels_may_be_one():
    stock, fast = pair(channels=1)
    x = normal(3, 1, 4, 6)
    assert_same(step(fast, x, x), step(stock, x, x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 16), (4, 16, 3)], ids=str)
@pytest.mark.parametrize("strided", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_that_are_not_contiguous(strided, shape, training):
    """The gradients equal those of contiguous parameters. torch's own backward of (N, C) reads the memory between them,
    NaN here.
    """
    results = []
    for stride in (1, 2):
        vectors = {}
        for seed, name in enumerate(("running_mean", "running_var", "weight", "bias")):
            memory = torch.full((32,), torch.nan)
            vectors[name] = memory[:: stride if name == strided else 1][:16]
            vectors[name].copy_(normal(16, seed=seed).abs() + 0.5)
        x = normal(*shape, seed=9).float().requires_grad_()
        weight, bias = (vectors[name].requires_grad_() for name in ("weight", "bias"))
        y = fastbn.functional.batch_norm(x, **vectors, training=training)
        results.append((y, *torch.autograd.grad(y, [x, weight, bias], normal(*shape, seed=8).float())))
    torch.testing.assert_close(*results)
