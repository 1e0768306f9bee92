"""The memory format of output and gradients: torch's for the same input, by every implementation of the rule."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbn
from fastbn.ops import contract, layout
from tests import implementations
from tests.stock import normal

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Strides of a dimension of size 1: the one of a dense tensor (None), or one that means nothing.
ODD_STRIDES = (None, 0, 1, 7, 1000)


def _strides(sizes, order):
    """Return strides that are dense in memory, for an order of the dimensions, the innermost first."""
    strides, stride = [0] * len(sizes), 1
    for d in order:
        strides[d] = stride
        stride *= sizes[d]
    return strides


def _tensor(sizes, strides):
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return torch.linspace(-1, 1, extent).as_strided(sizes, strides)


def _tensors(dim: int, gap: int):
    """Return every order of the dimensions and every choice of sizes 1, with a gap after one dimension."""
    seen = set()
    for ones in itertools.product((False, True), repeat=dim):
        sizes = [1 if one else size for one, size in zip(ones, (2, 3, 2, 3, 2), strict=False)]
        for order in itertools.permutations(range(dim)):
            memory = [n + gap * (d == order[1]) for d, n in enumerate(sizes)]
            dense = _strides(memory, order)
            for odd in ODD_STRIDES:
                strides = [s if odd is None or n != 1 else odd for n, s in zip(sizes, dense, strict=True)]
                seen.add((tuple(sizes), tuple(strides)))
    return [_tensor(sizes, strides) for sizes, strides in sorted(seen)]


def _formats(x: torch.Tensor) -> tuple[bool, bool]:
    return x.is_contiguous(), x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])


def _eval(function, x: torch.Tensor) -> torch.Tensor:
    return function(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]))


@pytest.mark.parametrize("gap", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_output_has_the_format_of_torch(dim, gap):
    """layout.suggest_memory_format and the fake kernels, which repeat the rule of C++, give the same strides."""
    for x in _tensors(dim, gap):
        actual, expected = _eval(fastbn.functional.batch_norm, x), _eval(F.batch_norm, x)
        which = f"sizes {tuple(x.shape)} strides {x.stride()}"
        assert _formats(actual) == _formats(expected), which
        memory_format = layout.suggest_memory_format(x)
        assert actual.stride() == torch.empty(x.shape).to(memory_format=memory_format).stride(), which
        assert actual.stride() == contract._activation(SimpleNamespace(input=x)).stride(), which


@pytest.mark.parametrize("gap", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_gradient_has_the_format_of_the_output(dim, gap):
    """torch makes a gradient of odd strides contiguous, and copies it again where the layer before is channels_last."""
    for x in random.Random(dim).sample(_tensors(dim, gap), 200):
        grads = []
        for function in (fastbn.functional.batch_norm, F.batch_norm):
            leaf = x.detach().requires_grad_()
            output = _eval(function, leaf)
            grads += torch.autograd.grad(output, leaf, torch.ones_like(output))
        assert _formats(grads[0]) == _formats(output), f"sizes {tuple(x.shape)} strides {x.stride()}"
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dim", [4, 5])
def test_tracing_sees_the_strides_of_the_op(dim):
    for x in random.Random(dim).sample(_tensors(dim, 0) + _tensors(dim, 1), 200):
        buffers = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        real = torch.ops.fastbn.batch_norm_eval(x, None, None, None, *buffers, 1e-5, 0)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (x, *buffers)]
            fake = torch.ops.fastbn.batch_norm_eval(fakes[0], None, None, None, *fakes[1:], 1e-5, 0)
        assert fake.stride() == real.stride(), f"sizes {tuple(x.shape)} strides {x.stride()}"


SEQUENCES = [
    ((5, 7, 4), lambda x: x.transpose(1, 2).unsqueeze(-1)),
    ((5, 7, 4), lambda x: x.transpose(1, 2).unsqueeze(2)),
    ((5, 3, 7, 4), lambda x: x.permute(0, 3, 1, 2).unsqueeze(-1)),
]


@pytest.mark.parametrize("shape,view", SEQUENCES, ids=["4d", "4d_rows", "5d"])
def test_a_sequence_of_rows_is_not_copied(shape, view):
    """(N, L, C) seen as an image one pixel wide: the stride of its size 1 means nothing."""
    x = view(normal(*shape, dtype=torch.float32))
    x.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = fastbn.functional.batch_norm(x, None, None, training=True, activation="relu")
        (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert _formats(output) == _formats(grad) == (False, True)
    assert not {"aten::contiguous", "aten::clone", "aten::copy_"} & {event.name for event in profile.events()}
    expected = torch.relu(F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, torch.ones_like(output))[0])


@pytest.mark.parametrize("ops", implementations.params("cpu", "emulator", "cuda", "triton"), indirect=True)
@pytest.mark.parametrize("shape,view", SEQUENCES[::2], ids=["4d", "5d"])
def test_a_mask_of_such_a_tensor(ops, shape, view):
    """Forward writes it and backward reads it in the layout of channels_last."""
    x, residual, grad_out = (view(normal(*shape, seed=seed, dtype=torch.float32)).to(ops.device) for seed in range(3))
    output, mean, inv_std, mask = ops.namespace.batch_norm_train(
        x, residual, None, None, None, None, None, 0.1, 1e-5, 1, True
    )
    assert mask.shape == (x.numel() // x.shape[1], (x.shape[1] + 7) // 8)
    grads = ops.namespace.batch_norm_backward(
        grad_out, x, None, mask, None, None, mean, inv_std, True, 1, True, False, False, True
    )
    leaf, leaf_residual = x.detach().clone().requires_grad_(), residual.detach().clone().requires_grad_()
    expected = torch.relu(F.batch_norm(leaf, None, None, training=True) + leaf_residual)
    torch.testing.assert_close(output, expected)
    expected.backward(grad_out)
    torch.testing.assert_close(grads[0], leaf.grad)
    torch.testing.assert_close(grads[3], leaf_residual.grad)
