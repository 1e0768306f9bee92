"""The tensors that are saved for backward. Hooks that return them with other strides change no gradient.

Such hooks are torch.autograd.graph.save_on_cpu(pin_memory=True), offloading to disk, and compression.
"""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.backends import registry
from fastbn.ops.activations import ACTIVATIONS, PIECEWISE_LINEAR
from tests import implementations
from tests.stock import normal

# With C = H * W a mask in the wrong layout has the right number of bytes.
SHAPES = {
    "contiguous": ((2, 16, 4, 4), torch.contiguous_format),
    "channels_last": ((2, 16, 4, 4), torch.channels_last),
    "channels_last_3d": ((2, 8, 2, 2, 2), torch.channels_last_3d),
    "(N, C)": ((5, 11), torch.contiguous_format),
    "channels_last, odd": ((3, 6, 5, 4), torch.channels_last),
    "contiguous, odd": ((3, 6, 5, 4), torch.contiguous_format),
}


def _to_channels_last(t):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def _to_disk(t):
    stream = io.BytesIO()
    torch.save(t, stream)
    return stream


def _from_disk(stream):
    stream.seek(0)
    return torch.load(stream)


HOOKS = {
    "contiguous": (lambda t: t.contiguous(), lambda t: t),
    "channels_last": (_to_channels_last, lambda t: t),
    "transposed": (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: t),
    "padded": (lambda t: F.pad(t, (0, 3)), lambda t: t[..., :-3]),
    "NumPy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "disk": (_to_disk, _from_disk),
}


def _gradients(shape, memory_format, activation, residual, training, backend, hooks=None):
    # float64 alone: the formats do not depend on the dtype, and NumPy has no bfloat16.
    x, r, grad_out = (normal(*shape, seed=seed).contiguous(memory_format=memory_format) for seed in (0, 1, 2))
    weight, bias = torch.linspace(0.5, 2, shape[1]).double(), torch.linspace(-1, 1, shape[1]).double()
    tensors = [t.requires_grad_() for t in ((x, r, weight, bias) if residual else (x, weight, bias))]
    statistics = torch.linspace(-0.5, 0.5, shape[1]).double(), torch.linspace(0.5, 2, shape[1]).double()

    def call():
        return fastbn.functional.batch_norm(
            x,
            *statistics,
            weight,
            bias,
            training=training,
            residual=r if residual else None,
            activation=activation,
            backend=backend,
        )

    if hooks is None:
        y = call()
    else:
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = call()
    return torch.autograd.grad(y, tensors, grad_out)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ops", implementations.params("reference", "cpu", "emulator", "triton"), indirect=True)
def test_hooks_that_change_strides_change_no_gradient(ops, shape, residual, training):
    backend = implementations.backend_name(ops.name)
    for activation in ("relu6", "gelu") if implementations.is_slow(ops.name) else ACTIVATIONS:
        options = (*SHAPES[shape], activation, residual, training, backend)
        expected = _gradients(*options)
        for name, hooks in HOOKS.items():
            for got, exact in zip(_gradients(*options, hooks), expected, strict=True):
                assert got.stride() == exact.stride(), f"{activation}, {name}"
                torch.testing.assert_close(got, exact, msg=lambda text, name=name: f"{activation}, {name}: {text}")


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_save_on_cpu(training, memory_format, adds):
    results = []
    for save_on_cpu in (False, True):
        x = normal(4, 64, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
        layer = fastbn.BatchNorm2d(64, activation="relu", dtype=torch.float64).train(training)
        shortcut = normal(4, 64, 8, 8, seed=1).contiguous(memory_format=memory_format) if adds else None
        if save_on_cpu:
            # The result of pin_memory=True, without the GPU that pinning needs.
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t), torch.clone
            )
            with hooks:
                y = layer(x, shortcut)
        else:
            y = layer(x, shortcut)
        results.append(torch.autograd.grad(y, [x, layer.weight, layer.bias], normal(4, 64, 8, 8, seed=2)))
    torch.testing.assert_close(*results, check_stride=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hooks_on_a_compiled_layer(training):
    """A compiled backward is traced with the strides of forward, so the mask itself has to tell its layout."""
    torch._dynamo.reset()
    layer = fastbn.BatchNorm2d(16, activation="relu", dtype=torch.float64).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function, hooks in ((layer, HOOKS["padded"]), (compiled, HOOKS["contiguous"])):
        x, r, grad_out = (
            normal(2, 16, 4, 4, seed=seed).contiguous(memory_format=torch.channels_last) for seed in (0, 1, 2)
        )
        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = function(x, r)
        results.append(torch.autograd.grad(y, [x, layer.weight, layer.bias], grad_out))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_and_second_derivatives(hook):
    shape = (2, 16, 4, 4)
    results = []
    for hooks in (None, HOOKS[hook]):
        if hook in ("NumPy", "disk") and hooks:
            hooks = (lambda t: t.clone(), lambda t: t.contiguous())  # those two cut the graph
        x = normal(*shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        r = normal(*shape, seed=1).requires_grad_()
        weight = torch.linspace(0.5, 2, 16).double().requires_grad_()
        context = torch.autograd.graph.saved_tensors_hooks(*(hooks or (lambda t: t, lambda t: t)))
        with context:
            y = fastbn.functional.batch_norm(x, None, None, weight, training=True, residual=r, activation="relu")
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), [x, r, weight]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wants_weight", [True, False], ids=["affine", "frozen_affine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_saved(activation, residual, training, wants_weight, backend):
    """Only tensors are saved, since tools that walk a graph rely on it; of those as large as the input, no more than
    backward reads.
    """
    x, r = normal(2, 8, 3, 3).requires_grad_(), normal(2, 8, 3, 3, seed=1).requires_grad_()
    weight, bias = (torch.ones(8, dtype=torch.float64).requires_grad_(wants_weight) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fastbn.functional.batch_norm(
            x,
            torch.zeros(8).double(),
            torch.ones(8).double(),
            weight,
            bias,
            training=training,
            residual=r if residual else None,
            activation=activation,
            backend=backend,
        )
    assert all(isinstance(t, torch.Tensor) for t in getattr(y.grad_fn, "saved_tensors", ()))
    masked = residual and activation in PIECEWISE_LINEAR
    recomputes = activation != "none" and not masked
    expected = [x] * (training or recomputes or wants_weight) + [r] * (recomputes and residual)
    large = [t for t in saved if t.dim() == 4]
    assert [t.data_ptr() for t in large] == [t.data_ptr() for t in expected]
    assert sum(t.dtype == torch.uint8 for t in saved) == masked


def test_a_frozen_layer_saves_a_bit_per_element_for_the_residual():
    """It saves the mask of relu, if neither weight nor bias are trained, and [C] tensors of float64."""
    layer = fastbn.BatchNorm2d(8, activation="relu").requires_grad_(False).eval()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        x = torch.randn(4, 8, 16, 16, requires_grad=True)
        layer(x, torch.randn(4, 8, 16, 16))
    assert sum(sizes) == x.numel() // 8 + 8 * (8 + 8 + 4)


def test_every_backend_of_a_cpu_saves_the_mask():
    x = torch.empty(2, 3, 5, 5)
    assert registry.get("cpu").saves_mask(x) and registry.get("reference").saves_mask(x)
