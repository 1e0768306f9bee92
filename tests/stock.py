"""torch.nn's BatchNorm as the model to follow: equal modules of both kinds, and the results of a step of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastbn

STOCK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
FAST = {1: fastbn.BatchNorm1d, 2: fastbn.BatchNorm2d, 3: fastbn.BatchNorm3d}
CHANNELS = 5
SHAPES = {1: (7, CHANNELS), 2: (3, CHANNELS, 4, 6), 3: (2, CHANNELS, 3, 4, 3)}


def pair(dim: int = 2, channels: int = CHANNELS, dtype: torch.dtype = torch.float64, **options):
    """Return a torch.nn module and fastbn's with the same parameters and buffers, none at its initial value."""
    generator = torch.Generator().manual_seed(dim)
    stock, fast = STOCK[dim](channels, dtype=dtype, **options), FAST[dim](channels, dtype=dtype, **options)
    with torch.no_grad():
        for tensor in (*stock.parameters(), *stock.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
            else:
                tensor.fill_(2)
    fast.load_state_dict(stock.state_dict())
    return stock, fast


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(module: nn.Module, x: Tensor, grad_out: Tensor | None = None, *residual: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of one forward and backward pass."""
    x = x.detach().requires_grad_(grad_out is not None)
    output = module(x, *residual)
    results = {"output": output.detach()}
    if grad_out is not None:
        trained = {"input": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
        trained |= {f"residual{i}": r for i, r in enumerate(residual) if r.requires_grad}
        grads = torch.autograd.grad(output, list(trained.values()), grad_out)
        results |= {f"grad of {name}": grad for name, grad in zip(trained, grads, strict=True)}
    return results


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def assert_same_buffers(fast: nn.Module, stock: nn.Module, **tolerance) -> None:
    assert_same(dict(fast.named_buffers()), dict(stock.named_buffers()), **tolerance)
