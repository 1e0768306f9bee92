"""A fused residual and activation against the torch composition: values, gradients, masks at 0 and NaN, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.ops.activations import ACTIVATIONS
from tests.stock import SHAPES, assert_same, assert_same_buffers, normal, pair, step

LAYOUTS = {
    "2d": ((7, 5), torch.contiguous_format),
    "4d": (SHAPES[2], torch.contiguous_format),
    "channels_last": (SHAPES[2], torch.channels_last),
    "channels_last_3d": (SHAPES[3], torch.channels_last_3d),
}


def _composition(module, activation):
    def forward(x, residual=None):
        z = module(x) if residual is None else module(x) + residual
        return z if activation == "none" else getattr(F, activation)(z)

    forward.named_parameters = module.named_parameters
    return forward


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fusion_is_the_composition(activation, layout, residual, training):
    shape, memory_format = LAYOUTS[layout]
    stock, fast = pair(max(len(shape) - 2, 1))
    stock.train(training), fast.train(training)
    fast.activation = activation
    x, grad_out = (normal(*shape, seed=seed).contiguous(memory_format=memory_format) * 3 for seed in (0, 1))
    added = [normal(*shape, seed=2).requires_grad_()] if residual else []
    actual = step(fast, x, grad_out, *added)
    assert_same(actual, step(_composition(stock, activation), x, grad_out, *added))
    assert_same_buffers(fast, stock)
    assert actual["output"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_branches_at_the_edges_are_torchs(activation, dtype, residual):
    """Running statistics make z equal to the input; with a residual of zeros and NaNs it goes through the mask.

    There are nine times 64 elements, which torch takes as full vectors: at NaN its scalar kernels for the rest of a
    tensor disagree with its vectorised ones about the derivatives of relu6, elu and hardswish.
    """
    # torch differentiates sigmoid and tanh by their outputs as they were rounded: in bfloat16 little is left of 1 - y.
    composed_in = torch.float32 if activation in ("sigmoid", "tanh") and dtype == torch.bfloat16 else dtype
    # At infinite z the derivatives of silu and gelu are NaN in some of torch's kernels.
    infinite = 9.0 if activation in ("silu", "gelu") else float("inf")
    edges = [-3.0, -0.0, 0.0, 3.0, 6.0, float("nan"), infinite, -infinite, 1.0]
    x = torch.tensor(edges, dtype=dtype).repeat(64, 1)
    mean, var = torch.zeros(9, dtype=dtype), torch.ones(9, dtype=dtype)
    added = None
    if residual:
        added = torch.zeros_like(x)
        added[:, -1] = float("nan")
    grads = []
    for fused in (True, False):
        z = x.clone().requires_grad_()
        if fused:
            eps = torch.finfo(torch.float64).tiny
            y = fastbn.functional.batch_norm(z, mean, var, eps=eps, residual=added, activation=activation)
        else:
            y = getattr(F, activation)((z if added is None else z + added).to(composed_in)).to(dtype)
        grads.append((y.detach(), *torch.autograd.grad(y, z, torch.full_like(y, 2))))
    for fused, composed in zip(*grads, strict=True):
        torch.testing.assert_close(fused, composed, equal_nan=True)


def test_a_residual_alone_needs_gradients():
    stock, fast = pair()
    stock.requires_grad_(False), fast.requires_grad_(False)
    x, residual = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1).requires_grad_()
    for activation in ("none", "relu", "gelu"):
        fast.activation = activation
        results = [f(x, residual) for f in (fast, _composition(stock, activation))]
        grads = [torch.autograd.grad(y, residual, x)[0] for y in results]
        torch.testing.assert_close(*grads)


def test_the_input_may_be_the_residual():
    stock, fast = pair()
    fast.activation = "relu"
    grads = []
    for forward in (fast, _composition(stock, "relu")):
        x = normal(*SHAPES[2]).requires_grad_()
        grads.append(torch.autograd.grad(forward(x, x).square().sum(), x)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "residual,message",
    [
        (torch.zeros(3, 5, 4, 1), r"expected residual of shape \[3, 5, 4, 6\], got \[3, 5, 4, 1\]"),
        (torch.zeros(3, 5, 4, 6, dtype=torch.float64), "expected residual of dtype torch.float32, got torch.float64"),
        (torch.zeros(3, 5, 4, 6, device="meta"), "expected residual on cpu, got meta"),
    ],
    ids=["shape", "dtype", "device"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_residual_that_does_not_fit(residual, message, training):
    _, fast = pair(dtype=torch.float32)
    fast.train(training)
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    with pytest.raises(ValueError, match=f"batch_norm: {message}"):
        fast(torch.zeros(3, 5, 4, 6), residual)
    assert_same(dict(fast.named_buffers()), before)
