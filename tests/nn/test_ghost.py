"""fastbn.GhostBatchNorm1d, 2d and 3d against a loop over virtual batches in float64, and BatchNorm where they meet."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fastbn
from fastbn.nn.ghost import group, ungroup
from fastbn.testing import assert_close_to_reference, tolerance
from tests.stock import CHANNELS, FAST, assert_same, assert_same_buffers, normal, pair, step

GHOST = {1: fastbn.GhostBatchNorm1d, 2: fastbn.GhostBatchNorm2d, 3: fastbn.GhostBatchNorm3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
IMAGE = {0: (), 1: (7,), 2: (2, 3), 3: (2, 1, 3)}


def _shape(samples, dim=2):
    return (samples, CHANNELS, *IMAGE[dim])


def _layer(dim=2, size=2, dtype=torch.float64, **options):
    """Return a layer with parameters and buffers that are not the first ones, and a BatchNorm with the same state."""
    layer = GHOST[dim](CHANNELS, virtual_batch_size=size, dtype=dtype, **options)
    _, plain = pair(dim, momentum=layer.momentum, eps=vars(layer)["eps"], dtype=dtype)
    layer.load_state_dict(plain.state_dict())
    return layer, plain


def _members(samples, size):
    """Return the samples of each virtual batch, as the class's docstring has them."""
    groups = max(1, samples // size)
    larger = samples % groups
    first = larger * (samples // groups + 1)
    members = [list(range(g, first, larger)) for g in range(larger)]
    smaller = groups - larger
    return members + [list(range(first + g, samples, smaller)) for g in range(smaller)]


def _expected(layer, x, residual, size, activation=None):
    """Return the output, differentiable, and the running statistics after it, one virtual batch after the other."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    output = [None] * len(x)
    moments = []
    for members in _members(len(x), size):
        part = x[members]
        normalised = F.batch_norm(part, None, None, layer.weight, layer.bias, True, eps=vars(layer)["eps"])
        normalised = normalised if residual is None else normalised + residual[members]
        normalised = normalised if activation is None else getattr(F, activation)(normalised)
        for n, sample in zip(members, normalised, strict=True):
            output[n] = sample
        share = len(members) / len(x)
        moments.append((share * part.detach().mean(dims), share * part.detach().var(dims, correction=1)))
    mean, var = (sum(each) for each in zip(*moments, strict=True))
    return torch.stack(output), mean, var


def test_virtual_batches_are_nearly_equal_and_never_smaller_than_asked_for():
    for samples in range(1, 40):
        for size in range(1, 12):
            members = _members(samples, size)
            sizes = sorted({len(each) for each in members})
            assert sorted(sum(members, [])) == list(range(samples))
            assert sizes[0] >= min(size, samples) and sizes[-1] <= max(2 * size - 1, 1) and sizes[-1] - sizes[0] < 2
            assert samples % size or sizes == [size]


@pytest.mark.parametrize("samples", [6, 7, 5], ids="{} samples".format)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dim", IMAGE)
def test_a_loop_over_virtual_batches(dim, activation, samples):
    layer, _ = _layer(max(dim, 1), activation=activation)
    x, residual, grad_out = (normal(*_shape(samples, dim), seed=seed) for seed in range(3))
    x, residual = (1.3 * x + 0.4).requires_grad_(), residual.requires_grad_()
    expected, mean, var = _expected(layer, x, residual, 2, activation)
    running_mean, running_var = 0.9 * layer.running_mean + 0.1 * mean, 0.9 * layer.running_var + 0.1 * var
    output = layer(x, residual)
    torch.testing.assert_close(output, expected)
    given = (x, residual, layer.weight, layer.bias)
    for grads in zip(*(torch.autograd.grad(t, given, grad_out) for t in (output, expected)), strict=True):
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(layer.running_mean, running_mean)
    torch.testing.assert_close(layer.running_var, running_var)
    assert layer.num_batches_tracked == 3  # of a counter at 2


@pytest.mark.parametrize("samples", [6, 5], ids="{} samples".format)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_backend(every_backend, samples, channels_last):
    layer, _ = _layer(dtype=torch.float32, activation="relu")
    x, residual, grad_out = (normal(*_shape(samples), seed=seed) for seed in range(3))
    reference = copy.deepcopy(layer).double()
    exact = step(reference, x, grad_out, residual.requires_grad_())
    _, mean, var = _expected(reference, x, residual, 2)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, grad_out = (t.detach().float().to(memory_format=memory_format) for t in (x, residual, grad_out))
    before = layer.running_mean.double(), layer.running_var.double()
    actual = step(layer, x, grad_out, residual.requires_grad_())
    count = 2 * x[0, 0].numel()
    for name, value in exact.items():
        # A gradient of a parameter adds up all terms, of at most 4 * 4 each; no other term is larger than 4 * 4.
        terms = x.numel() // CHANNELS if name in ("grad of weight", "grad of bias") else 1
        allowed = tolerance.sum_tolerance(torch.float32, count, 16.0 * terms)
        assert_close_to_reference(actual[name], value, allowed, name)
        if value.dim() == 4:
            assert actual[name].is_contiguous(memory_format=memory_format), name
    for buffer, old, batch in zip((layer.running_mean, layer.running_var), before, (mean, var), strict=True):
        torch.testing.assert_close(buffer, (0.9 * old + 0.1 * batch).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_virtual_batch_that_is_the_whole_is_batch_norm_bit_for_bit(dim, dtype):
    x, grad_out, residual = (normal(*_shape(6, dim), seed=seed, dtype=dtype) for seed in range(3))
    for size in (4, 6, 100):
        layer, plain = _layer(dim, size, dtype, activation="relu")
        plain.activation = "relu"
        actual, expected = (step(module, x, grad_out, residual.requires_grad_()) for module in (layer, plain))
        assert_same(actual, expected, rtol=0, atol=0)
        assert_same_buffers(layer, plain, rtol=0, atol=0)


def test_evaluation_is_batch_norms():
    layer, plain = (module.eval() for module in _layer())
    x, grad_out = normal(*_shape(6)), normal(*_shape(6), seed=1)
    assert_same(step(layer, x, grad_out), step(plain, x, grad_out), rtol=0, atol=0)
    untracked = GHOST[2](CHANNELS, virtual_batch_size=2, track_running_stats=False, dtype=torch.float64)
    expected = FAST[2](CHANNELS, track_running_stats=False, dtype=torch.float64).eval()(x)
    assert torch.equal(copy.deepcopy(untracked).eval()(x), expected)
    assert not torch.allclose(untracked(x), expected)


@pytest.mark.parametrize("samples", [6, 7], ids="{} samples".format)
@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_running_statistics(momentum, samples):
    layer, _ = _layer(momentum=momentum)
    expected = {name: getattr(layer, name).clone() for name in ("running_mean", "running_var")}
    for batch in range(3):
        x = normal(*_shape(samples), seed=batch)
        _, *moments = _expected(layer, x, None, 2)
        factor = 1 / (batch + 3) if momentum is None else momentum
        for (name, old), new in zip(list(expected.items()), moments, strict=True):
            expected[name] = (1 - factor) * old + factor * new
        layer(x)
    exactly = {"rtol": 0, "atol": 0} if momentum == 0 else {}
    assert_same({name: getattr(layer, name) for name in expected}, expected, **exactly)
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("samples", [6, 7], ids="{} samples".format)
def test_running_statistics_of_half_types_are_rounded_once(samples):
    layer, _ = _layer(dtype=torch.bfloat16)
    before = {name: getattr(layer, name).double() for name in ("running_mean", "running_var")}
    x = normal(*_shape(samples), dtype=torch.bfloat16)
    _, *moments = _expected(copy.deepcopy(layer).double(), x.double(), None, 2)
    layer(x)
    for (name, old), new in zip(before.items(), moments, strict=True):
        exact = 0.9 * old + 0.1 * new
        # Half a spacing for the rounding to bfloat16, and what float32 adds is below a hundredth of one.
        assert_close_to_reference(getattr(layer, name), exact, 0.51 * tolerance.ulp(torch.bfloat16, exact), name)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_grouping_is_a_view_of_contiguous_memory_and_keeps_channels_last(dim):
    x = normal(*_shape(6, dim))
    grouped = group(x, 2, 3)
    assert grouped.shape == (2, 3 * CHANNELS, *IMAGE[dim]) and grouped._base is x
    assert torch.equal(grouped[1, 2 * CHANNELS + 4], x[5, 4])
    assert ungroup(grouped, 3, CHANNELS, torch.contiguous_format).data_ptr() == x.data_ptr()
    if dim in FORMATS:
        last = x.to(memory_format=FORMATS[dim])
        regrouped = group(last, 2, 3)
        assert torch.equal(regrouped, grouped) and regrouped.is_contiguous(memory_format=FORMATS[dim])
        back = ungroup(regrouped, 3, CHANNELS, FORMATS[dim])
        assert torch.equal(back, x) and back.is_contiguous(memory_format=FORMATS[dim])


def test_a_contiguous_batch_is_one_launch_a_direction():
    """One call of the op, with what it saves: neither input nor output is copied."""
    layer, _ = _layer(dtype=torch.float32)
    x = normal(*_shape(6), dtype=torch.float32).requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x).backward(torch.ones_like(x))
    calls = {}
    for event in profile.events():
        calls[event.name] = calls.get(event.name, 0) + 1
        if event.name in ("aten::copy_", "aten::clone", "aten::cat"):
            assert all(torch.Size(shape).numel() < x.numel() for shape in event.input_shapes), event
    assert calls["fastbn::batch_norm_train"] == calls["fastbn::batch_norm_backward"] == 1


def test_gradients_and_second_derivatives():
    for samples in (4, 5):
        layer, _ = _layer(1, activation="silu")
        x, residual = (normal(samples, CHANNELS, seed=seed).requires_grad_() for seed in (3, 4))

        def function(x, residual, weight, bias, layer=layer):
            values = {"weight": weight, "bias": bias}
            return torch.func.functional_call(copy.deepcopy(layer), values, (x, residual))

        given = (x, residual, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_it_works_with_what_surrounds_a_layer():
    layer, plain = _layer()
    assert list(layer.state_dict()) == list(plain.state_dict())
    x, grad_out = normal(*_shape(7)), normal(*_shape(7), seed=1)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    traced = fx.symbolic_trace(nn.Sequential(copy.deepcopy(layer)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    expected = step(layer, x, grad_out)
    for other in copies:
        assert_same(step(other, x, grad_out), expected, rtol=0, atol=0)
        assert_same_buffers(other, layer, rtol=0, atol=0)
    assert torch.equal(traced(x), expected["output"])
    assert "virtual_batch_size=2" in repr(layer)


@pytest.mark.parametrize("samples", [6, pytest.param(7, marks=pytest.mark.slow)], ids="{} samples".format)
def test_compiled_it_is_one_graph(samples):
    layer, _ = _layer(dtype=torch.float32, activation="relu")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x, grad_out, residual = (normal(*_shape(samples), seed=seed, dtype=torch.float32) for seed in range(3))
    expected = step(layer, x, grad_out, residual.requires_grad_())
    actual = step(compiled, x, grad_out, residual)
    assert_same({name.replace("_orig_mod.", ""): value for name, value in actual.items()}, expected)
    assert_same_buffers(compiled._orig_mod, layer)


@pytest.mark.slow
def test_inductor_moves_running_statistics_by_batches_of_any_size():
    layer, _ = _layer(dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True)
    for samples in (4, 6, 8, 7, 9):
        x = normal(*_shape(samples), seed=samples, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), layer(x))
        assert_same_buffers(compiled._orig_mod, layer)


def test_a_module_that_is_called_twice_before_backward():
    layer, _ = _layer()
    inputs = [normal(*_shape(6), seed=seed).requires_grad_() for seed in range(2)]
    expected = [torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x)[0] for x in inputs]
    outputs = [layer(x) for x in inputs]
    for output, x, grad in zip(outputs, inputs, expected, strict=True):
        assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], grad)


def test_its_output_can_be_changed_in_place():
    layer, _ = _layer()
    x = normal(*_shape(6)).requires_grad_()
    expected = torch.autograd.grad(copy.deepcopy(layer)(x).relu().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(F.relu_(layer(x)).sum(), x)[0], expected)


def test_convert_fuses_what_follows_and_checkpoints_move_statistics_once():
    layer, _ = _layer()
    model = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
    x = normal(*_shape(6)).requires_grad_()
    expected = model(x)
    converted = fastbn.convert(nn.Sequential(copy.deepcopy(layer), nn.ReLU()))
    assert type(converted[0]) is fastbn.GhostBatchNorm2d
    output = converted(x)
    torch.testing.assert_close(output, expected)
    assert "ReluBackward" not in str(output.grad_fn) and converted[0].num_batches_tracked == 3
    safe = fastbn.checkpoint_safe(copy.deepcopy(layer))
    torch.utils.checkpoint.checkpoint(safe, x, use_reentrant=False).sum().backward()
    assert_same_buffers(safe, model[0], rtol=0, atol=0)


def test_scripting_is_refused():
    with pytest.raises(TypeError, match="expected layers with a form in TorchScript, got GhostBatchNorm2d"):
        torch.jit.script(nn.Sequential(fastbn.GhostBatchNorm2d(3, virtual_batch_size=2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_beside_float32_parameters(dtype):
    layer, _ = _layer(dtype=torch.float32)
    x = normal(*_shape(6)).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(layer).double()(x.double())
    output = layer(x)
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    scale = expected.abs().max().item()
    allowed = tolerance.forward_tolerance(torch.float32, 12, scale) + tolerance.ulp(dtype, expected) / 2
    assert_close_to_reference(output, expected, allowed, "output")


def test_inference_mode_and_empty_batches():
    layer, plain = _layer()
    x = normal(*_shape(6))
    expected = copy.deepcopy(layer)(x).detach()
    with torch.inference_mode():
        output = copy.deepcopy(layer)(x)
    assert torch.equal(output, expected) and output.is_inference()
    for module in (layer, plain):
        module(x[:0])
    assert_same_buffers(layer, plain, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, -1, 2.0, None], ids=str)
def test_sizes_outside(size):
    with pytest.raises(ValueError, match=f"virtual_batch_size: expected an int from 1 on, got {size}"):
        fastbn.GhostBatchNorm2d(3, virtual_batch_size=size)


def test_one_sample_is_a_virtual_batch_if_it_has_several_values_per_channel():
    layer, _ = _layer(2, 1)
    x = normal(*_shape(3))
    torch.testing.assert_close(layer(x), F.instance_norm(x, None, None, layer.weight, layer.bias))
    layer, _ = _layer(1, 1)
    before = copy.deepcopy(layer)
    for shape in ((3, CHANNELS), (3, CHANNELS, 1)):
        message = f"more than one value per channel in a virtual batch, got virtual_batch_size=1 .* shape .{shape[0]}"
        with pytest.raises(ValueError, match=message):
            layer(normal(*shape))
    assert_same_buffers(layer, before)


def test_calls_that_are_refused_move_nothing_and_are_worded_as_batch_norms():
    layer, plain = _layer()
    before = copy.deepcopy(layer)
    x = normal(*_shape(6))
    for arguments in ((x[0],), (x.int(),), (x, x[:1]), (x[:, :3],), (x.float(),)):
        messages = []
        for module in (layer, plain):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                module(*arguments)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1]
    assert_same_buffers(layer, before)
