"""fastbn.MaskedBatchNorm1d and 2d against BatchNorm of the elements that count, put together, in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fastbn
from fastbn.testing import assert_close_to_reference, tolerance
from tests.stock import CHANNELS, assert_same, assert_same_buffers, normal, pair, step

SHAPES = {1: (9, CHANNELS), 2: (4, CHANNELS, 7), 3: (3, CHANNELS, 4, 6)}  # by the number of dimensions after N
MASKED = {1: fastbn.MaskedBatchNorm1d, 2: fastbn.MaskedBatchNorm1d, 3: fastbn.MaskedBatchNorm2d}


def _layer(dim=2, dtype=torch.float64, **options):
    """Return a layer with parameters and buffers that are not the first ones, and a BatchNorm with the same state."""
    layer = MASKED[dim](CHANNELS, dtype=dtype, **options)
    _, plain = pair(max(dim - 1, 1), momentum=layer.momentum, eps=vars(layer)["eps"], dtype=dtype)
    layer.load_state_dict(plain.state_dict())
    return layer, plain


def _mask(dim=2, seed=3, share=0.6):
    samples, _, *spatial = SHAPES[dim]
    return torch.rand(samples, *spatial, generator=torch.Generator().manual_seed(seed)) < share


def _wide(mask):
    return mask.unsqueeze(1)


def _rows(x, mask):
    """Return the elements that count, (count, C)."""
    return x.movedim(1, -1)[mask]


def _expected(plain, x, mask, residual, padding, activation=None):
    """Return the output, differentiable: that of a BatchNorm for the elements that count, whose buffers move."""
    rows = nn.functional.batch_norm(
        _rows(x, mask),
        plain.running_mean,
        plain.running_var,
        plain.weight,
        plain.bias,
        plain.training,
        plain.momentum,
        vars(plain)["eps"],
    )
    rows = rows if residual is None else rows + _rows(residual, mask)
    rows = rows if activation is None else getattr(F, activation)(rows)
    others = x if padding == "keep" else torch.zeros_like(x)
    return others.movedim(1, -1).masked_scatter(mask.unsqueeze(-1), rows).movedim(-1, 1)


def _with_padding(x, mask, value):
    """Return a leaf with x's elements where they count, and `value` elsewhere."""
    return torch.where(_wide(mask), x, value).detach().requires_grad_()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dim", SHAPES)
def test_it_is_batch_norm_of_what_counts(dim, activation, padding, training):
    layer, plain = (module.train(training) for module in _layer(dim, padding=padding, activation=activation))
    mask = _mask(dim)
    x, residual, grad_out = (normal(*SHAPES[dim], seed=seed) for seed in range(3))
    x, residual = _with_padding(1.3 * x + 0.4, mask, 7.0), residual.requires_grad_()
    given = (x, residual, plain.weight, plain.bias)
    expected = _expected(plain, x, mask, residual, padding, activation)
    expected_grads = torch.autograd.grad(expected, given, grad_out)

    x, residual = (_with_padding(t, mask, float("nan")) for t in (x, residual))
    output = layer(x, mask, residual=residual)
    grads = torch.autograd.grad(output, (x, residual, layer.weight, layer.bias), grad_out)
    others = ~_wide(mask).expand_as(x)
    assert output[others].isnan().all() if padding == "keep" else not output[others].any()
    expected = torch.where(others, x if padding == "keep" else 0.0, expected)
    torch.testing.assert_close(output, expected, equal_nan=True)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name), getattr(plain, name))
    assert layer.num_batches_tracked == 2 + training


@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("dim", [2, 3])
def test_every_backend(every_backend, dim, padding):
    """With a mean of 100 standard deviations, and NaN for padding."""
    layer, _ = _layer(dim, torch.float32, padding=padding, activation="relu")
    reference, mask = copy.deepcopy(layer).double(), _mask(dim)
    x, residual, grad_out = (normal(*SHAPES[dim], seed=seed).float() for seed in range(3))
    x, residual = _with_padding(x + 100, mask, float("nan")), residual.requires_grad_()
    exact_x, exact_residual = (t.detach().double().requires_grad_() for t in (_with_padding(x, mask, 0.0), residual))
    exact = _expected(reference, exact_x, mask, exact_residual, padding, "relu")
    exact_grads = torch.autograd.grad(
        exact, (exact_x, exact_residual, reference.weight, reference.bias), grad_out.double()
    )
    output = layer(x, mask, residual=residual)
    grads = torch.autograd.grad(output, (x, residual, layer.weight, layer.bias), grad_out)
    count = int(mask.sum())
    selected = _wide(mask).expand_as(x)
    assert_close_to_reference(
        output[selected], exact[selected], tolerance.forward_tolerance(torch.float32, count, 8.0), "output"
    )
    for grad, right, terms in zip(grads, exact_grads, (1, 1, count, count), strict=True):
        # A gradient of a parameter adds up `count` terms, of at most 4 * 4 each; no other term is larger than 4 * 4.
        assert_close_to_reference(grad, right, tolerance.sum_tolerance(torch.float32, count, 16.0 * terms), "gradient")
    for name in ("running_mean", "running_var"):
        # Sums of float32 terms about a pivot, and a float32 buffer: some eight roundings.
        torch.testing.assert_close(getattr(layer, name).double(), getattr(reference, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", SHAPES)
def test_a_full_mask_is_batch_norm_bit_for_bit(dim, dtype):
    """In float64 except for the last bits: the fused op has the rest of the rounded mean, and rounds var otherwise."""
    exactly = {"rtol": 1e-14, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    mask = torch.ones_like(_mask(dim))
    for training in (True, False):
        layer, plain = (module.train(training) for module in _layer(dim, dtype, activation="silu"))
        plain.activation = "silu"
        x, residual, grad_out = (normal(*SHAPES[dim], seed=seed, dtype=dtype) for seed in range(3))
        results = []
        for module, function in ((layer, lambda x, r: layer(x, mask, residual=r)), (plain, plain)):  # noqa: B023
            given = x.clone().requires_grad_(), residual.clone().requires_grad_()
            output = function(*given)
            results.append((output, *torch.autograd.grad(output, (*given, module.weight, module.bias), grad_out)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, **exactly)
        assert_same_buffers(layer, plain, **exactly)


@pytest.mark.parametrize("share", [0.6, 0.02], ids="{} of all".format)
def test_it_is_fastbns_batch_norm_of_the_data_put_together(share):
    """In float32, with a standard deviation that is a thousandth of the mean."""
    samples, length = 40, 50
    mask = torch.rand(samples, length, generator=torch.Generator().manual_seed(5)) < share
    x = (normal(samples, CHANNELS, length) + 1000).float()
    layer, plain = _layer(2, torch.float32)
    rows = _rows(_with_padding(x, mask, float("inf")), mask).detach()
    grad_out = normal(*rows.shape, seed=1).float()
    expected = step(plain, rows, grad_out)
    x = _with_padding(x, mask, float("inf"))
    output = layer(x, mask)
    grads = torch.autograd.grad(_rows(output, mask), (x, layer.weight, layer.bias), grad_out)
    actual = [_rows(output, mask), _rows(grads[0], mask), *grads[1:]]
    # Both are within the tolerance of the exact result.
    count = len(rows)
    element = tolerance.forward_tolerance(torch.float32, count, 8.0, steepness=1000.0).item()
    total = tolerance.sum_tolerance(torch.float32, count, 20.0 * count).item()
    for value, right, allowed in zip(actual, expected.values(), (element, element, total, total), strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=2 * allowed)
    assert_same_buffers(layer, plain, rtol=1e-6, atol=0)  # some eight roundings of float32, as above


@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_count_of_zero_or_one(every_backend, count, padding):
    layer, plain = _layer(padding=padding)
    before = copy.deepcopy(layer)
    mask = torch.zeros(*SHAPES[2][::2], dtype=torch.bool)
    mask.view(-1)[9] = count == 1
    x, residual = (_with_padding(normal(*SHAPES[2], seed=seed), mask, float("nan")) for seed in range(2))
    output = layer(x, mask, residual=residual)
    torch.testing.assert_close(_rows(output, mask), layer.bias + _rows(residual, mask))
    grad_out = normal(*SHAPES[2], seed=2)
    grads = torch.autograd.grad(output, (x, residual, layer.weight, layer.bias), grad_out)
    others = ~_wide(mask).expand_as(x)
    assert torch.equal(grads[0], torch.where(others, grad_out, 0.0) if padding == "keep" else torch.zeros_like(x))
    assert torch.equal(grads[1], torch.where(others, 0.0, grad_out))
    assert not grads[2].any() and torch.equal(grads[3], grads[1].sum((0, 2)))
    mean = before.running_mean if count == 0 else 0.9 * before.running_mean + 0.1 * x.detach()[~others]
    torch.testing.assert_close(layer.running_mean, mean)
    assert torch.equal(layer.running_var, before.running_var) and layer.num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_lengths_are_a_mask(training, dtype):
    layer, other = (_layer()[0].train(training) for _ in range(2))
    lengths = torch.tensor([7, 0, 3, 99], dtype=dtype)
    mask = torch.tensor([[n < length for n in range(7)] for length in lengths.tolist()])
    x = normal(*SHAPES[2])
    expected = layer(x, mask)
    assert torch.equal(other(x, lengths=lengths), expected) and torch.equal(layer(x, mask.unsqueeze(1))[0], expected[0])
    assert not expected[1].any() and not expected[2, :, 3:].any() and expected[0].all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_a_mask_it_is_batch_norm(training):
    for dim in SHAPES:
        layer, plain = (module.train(training) for module in _layer(dim))
        x, grad_out = normal(*SHAPES[dim]), normal(*SHAPES[dim], seed=1)
        assert_same(step(layer, x, grad_out), step(plain, x, grad_out), rtol=0, atol=0)
        assert_same_buffers(layer, plain, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_running_statistics(momentum):
    layer, plain = _layer(momentum=momentum)
    for seed in range(3):
        x, mask = normal(*SHAPES[2], seed=seed), _mask(seed=seed)
        layer(x, mask)
        plain(_rows(x, mask))
        assert_same_buffers(layer, plain)


def test_without_running_statistics_evaluation_is_of_the_batch_too():
    layer = fastbn.MaskedBatchNorm1d(CHANNELS, track_running_stats=False, dtype=torch.float64)
    x, mask = normal(*SHAPES[2]), _mask()
    output = layer(x, mask)
    torch.testing.assert_close(_rows(output, mask), F.batch_norm(_rows(x, mask), None, None, training=True))
    assert torch.equal(layer.eval()(x, mask), output)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_rows_of_channels_stay_where_they_lie(training, masked):
    """(N, L, C) of sequence models: nothing is transposed, in either direction."""
    layer, _ = _layer(dtype=torch.float32, activation="silu")
    other = copy.deepcopy(layer.train(training))
    samples, channels, length = 6, CHANNELS, 11
    mask = torch.rand(samples, length, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    x, residual, grad_out = (normal(samples, length, channels, seed=seed).float() for seed in range(3))
    tokens, residual = x.clone().requires_grad_(), residual.requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        output = layer(tokens.transpose(1, 2), mask, residual=residual.transpose(1, 2)).transpose(1, 2)
        grads = torch.autograd.grad(output, (tokens, residual, layer.weight, layer.bias), grad_out)
    copies = ("aten::copy_", "aten::clone", "aten::contiguous")
    sizes = [torch.Size(event.input_shapes[0]).numel() for event in profile.events() if event.name in copies]
    assert all(size < x.numel() for size in sizes)
    assert output.is_contiguous() and all(grad.is_contiguous() for grad in grads[:2])
    x, residual = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (x, residual))
    expected = other(x, mask, residual=residual)
    assert expected.is_contiguous()
    right = torch.autograd.grad(expected, (x, residual, other.weight, other.bias), grad_out.transpose(1, 2))
    torch.testing.assert_close(output.transpose(1, 2), expected)
    for grad, value in zip(grads, right, strict=True):
        torch.testing.assert_close(grad.transpose(1, 2) if grad.dim() == 3 else grad, value)
    assert_same_buffers(layer, other)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_in_channels_last(dtype, padding, training):
    layer, _ = _layer(3, torch.float32, padding=padding)
    reference, mask = copy.deepcopy(layer.train(training)).double(), _mask(3)
    x = normal(*SHAPES[3]).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = reference(x.detach().double(), mask)
    output = layer(x, mask)
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    scale = expected.abs().max().item()
    allowed = tolerance.forward_tolerance(torch.float32, 72, scale) + tolerance.ulp(dtype, expected) / 2
    assert_close_to_reference(output, expected, allowed, "output")
    (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert grad.dtype == dtype and grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_and_second_derivatives(training, padding):
    layer, _ = _layer(1, activation="silu", padding=padding)
    layer.train(training)
    mask = torch.tensor([True, True, False, True, True])
    x, residual = (normal(5, CHANNELS, seed=seed).requires_grad_() for seed in (3, 4))

    def function(x, residual, weight, bias):
        values = {"weight": weight, "bias": bias}
        return torch.func.functional_call(copy.deepcopy(layer), values, (x, mask), {"residual": residual})

    given = (x, residual, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_it_works_with_what_surrounds_a_layer():
    layer, plain = _layer(padding="keep")
    assert list(layer.state_dict()) == list(plain.state_dict())
    x, mask = normal(*SHAPES[2]), _mask()
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x, mask)
    for other in copies:
        assert torch.equal(other(x, mask), expected)
        assert_same_buffers(other, layer, rtol=0, atol=0)
    assert type(fastbn.convert(nn.Sequential(copies[0]), fuse=True)[0]) is fastbn.MaskedBatchNorm1d
    assert "padding='keep'" in repr(layer)


class Masked(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, mask, residual):
        return self.norm(x, mask, residual=residual)


class OfLengths(Masked):
    def forward(self, x, lengths):
        return self.norm(x, lengths=lengths)


@pytest.mark.parametrize("safe", [False, True], ids=["", "checkpoint safe"])
def test_it_is_a_leaf_of_symbolic_tracing_with_all_arguments(safe):
    layer, _ = _layer()
    model = Masked(fastbn.checkpoint_safe(copy.deepcopy(layer)) if safe else copy.deepcopy(layer))
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder"] * 3 + ["call_module", "output"]
    x, residual, mask = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1), _mask()
    assert torch.equal(traced(x, mask, residual), layer(x, mask, residual=residual))
    lengths = torch.tensor([7, 3, 0, 1])
    traced = fx.symbolic_trace(OfLengths(layer))
    assert torch.equal(traced(x, lengths), layer(x, lengths=lengths))


@pytest.mark.parametrize(
    "padding,transposed", [("zero", False), pytest.param("keep", True, marks=pytest.mark.slow)], ids=["", "transposed"]
)
def test_compiled_it_is_one_graph(padding, transposed):
    """And so without a host sync, at which a graph ends."""
    layer, _ = _layer(dtype=torch.float32, padding=padding, activation="relu")
    compiled = torch.compile(Masked(copy.deepcopy(layer)), fullgraph=True, backend="aot_eager")
    x, residual, grad_out = (normal(*SHAPES[2], seed=seed).float() for seed in range(3))
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
    x, mask, results = x.requires_grad_(), _mask(), []
    for function, module in ((Masked(layer), layer), (compiled, compiled.norm)):
        output = function(x, mask, residual)
        results.append((output, *torch.autograd.grad(output, (x, module.weight, module.bias), grad_out)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert_same_buffers(compiled.norm, layer)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["zero", "keep"])
def test_inductor_takes_batches_of_any_size(padding):
    layer, _ = _layer(dtype=torch.float32, padding=padding, activation="silu")
    compiled = torch.compile(OfLengths(copy.deepcopy(layer)), fullgraph=True, dynamic=True)
    for samples, length in ((4, 7), (6, 9), (3, 20)):
        x = normal(samples, CHANNELS, length, seed=samples, dtype=torch.float32).requires_grad_()
        grad_out = normal(samples, CHANNELS, length, seed=1, dtype=torch.float32)
        lengths, results = torch.arange(samples) * 2, []
        for function in (OfLengths(layer), compiled):
            output = function(x, lengths)
            results.append((output, *torch.autograd.grad(output, (x, function.norm.weight), grad_out)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        assert_same_buffers(compiled.norm, layer)


def test_nothing_waits_for_the_data():
    """On the meta device there is none."""
    layer = fastbn.MaskedBatchNorm1d(CHANNELS, activation="relu", device="meta")
    x = torch.empty(SHAPES[2], device="meta", requires_grad=True)
    for given in ({"mask": _mask().to("meta")}, {"lengths": torch.empty(4, dtype=torch.int64, device="meta")}):
        output = layer(x, **given)
        output.sum().backward()
        assert output.shape == x.grad.shape == x.shape


def test_a_module_that_is_called_twice_before_backward():
    layer, _ = _layer()
    inputs = [normal(*SHAPES[2], seed=seed).requires_grad_() for seed in range(2)]
    masks = [_mask(seed=seed) for seed in range(2)]
    expected = [
        torch.autograd.grad(copy.deepcopy(layer)(x, mask).square().sum(), x)[0]
        for x, mask in zip(inputs, masks, strict=True)
    ]
    outputs = [layer(x, mask) for x, mask in zip(inputs, masks, strict=True)]
    for output, x, grad in zip(outputs, inputs, expected, strict=True):
        assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], grad)


def test_inference_mode_and_empty_batches():
    layer, plain = _layer()
    x, mask = normal(*SHAPES[2]), _mask()
    expected = copy.deepcopy(layer)(x, mask).detach()
    with torch.inference_mode(), torch.enable_grad():
        output = copy.deepcopy(layer)(x, mask)
    assert torch.equal(output, expected) and output.is_inference() and not output.requires_grad
    assert layer(x[:0], mask[:0]).shape == x[:0].shape
    plain(x[:0])
    assert_same_buffers(layer, plain, rtol=0, atol=0)


def test_vmap_and_jacobians_look_through_it():
    layer, _ = _layer(1)
    mask = torch.tensor([True, False, True, True])
    frozen = lambda x: copy.deepcopy(layer)(x, mask)  # noqa: E731
    x = normal(4, CHANNELS)
    jacobian = torch.func.jacrev(frozen)(x)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(frozen, x))


def test_scripting_is_refused():
    with pytest.raises(TypeError, match="expected layers with a form in TorchScript, got MaskedBatchNorm1d"):
        torch.jit.script(nn.Sequential(fastbn.MaskedBatchNorm1d(3)))


def test_arguments_outside():
    with pytest.raises(ValueError, match='padding: expected "zero" or "keep", got \'same\''):
        fastbn.MaskedBatchNorm1d(3, padding="same")
    with pytest.raises(ValueError, match="activation: expected one of"):
        fastbn.MaskedBatchNorm1d(3, activation="nothing")


def test_calls_that_are_refused_move_nothing():
    x, mask, lengths = normal(*SHAPES[2]), _mask(), torch.ones(4, dtype=torch.int64)
    for training in (True, False):
        layer, _ = _layer()
        before = copy.deepcopy(layer.train(training))
        for arguments, message in (
            ({"mask": mask, "lengths": lengths}, "expected a mask or lengths, got both"),
            ({"mask": mask[:, :3]}, r"mask: expected shape \[4, 7\] or \[4, 1, 7\], .* got \[4, 3\]"),
            ({"mask": mask.unsqueeze(1).expand_as(x)}, r"the same for all channels, got \[4, 5, 7\]"),
            ({"mask": mask.int()}, "mask: expected torch.bool, True where an element counts, got torch.int32"),
            ({"mask": mask.to("meta")}, "mask: expected a tensor on cpu, got one on meta"),
            ({"lengths": lengths[:2]}, r"lengths: expected shape \[4\], got \[2\]"),
            ({"lengths": lengths.double()}, "lengths: expected torch.int64 or torch.int32, got torch.float64"),
            ({"mask": mask, "residual": x[:1]}, "expected residual of shape"),
            ({"mask": mask[:, 0], "input": x[0]}, "mask: expected shape"),
        ):
            with pytest.raises(ValueError, match=message):
                layer(**{"input": x, **arguments})
        assert_same_buffers(layer, before, rtol=0, atol=0)
    layer.train()
    for given, message in ((x[:1, :, :1], "there is but one value a channel"), (x.int(), "no kernels for torch.int32")):
        with pytest.raises(ValueError, match=message):
            layer(given, torch.ones(len(given), given.shape[2], dtype=torch.bool))
    with pytest.raises(ValueError, match=r"lengths: expected an input \(N, C, L\), got one of shape \[9, 5\]"):
        layer(normal(*SHAPES[1]), lengths=torch.ones(9, dtype=torch.int64))
    assert_same_buffers(layer, before, rtol=0, atol=0)
