"""Prints the table of docs/variants.md about accumulated batches: `python -m docs.accumulated`, some ten seconds.

One batch of 32 images goes through a small network whole, and in micro-batches with and without fastbn.accumulate.
Errors are relative to the whole batch: the norm of the difference by the norm, averaged over eight batches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbn

IMAGES, CHANNELS, CLASSES, BATCHES = 32, 16, 10, 8
DEPTHS, SIZES = (1, 3, 6), (8, 4, 2)


def network(depth: int) -> nn.Sequential:
    """Return `depth` convolutions, each with a BatchNorm whose running statistics are those of one step."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(depth):
        convolution = nn.Conv2d(CHANNELS if index else 3, CHANNELS, 3, 1 + index % 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(CHANNELS, momentum=None), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Return images that differ in brightness and contrast, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    contrast, brightness = draw(IMAGES, 3, 1, 1).exp(), draw(IMAGES, 3, 1, 1) / 2
    images = draw(IMAGES, 3, 16, 16) * contrast + brightness
    return images, torch.randint(CLASSES, (IMAGES,), generator=generator)


@functools.cache
def step(depth: int, seed: int, size: int, accumulates: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of all parameters, and the running variances of the first and the last BatchNorm."""
    model, (images, classes) = network(depth), data(seed)
    with fastbn.accumulate(model) if accumulates else contextlib.nullcontext():
        for x, y in zip(images.split(size), classes.split(size), strict=True):
            (F.cross_entropy(model(x), y) * len(x) / IMAGES).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    variances = [layer.running_var for layer in model if isinstance(layer, nn.BatchNorm2d)]
    return gradient, variances[0], variances[-1]


def errors(depth: int, size: int, accumulates: bool) -> list[float]:
    """Return the mean errors of what `step` returns."""
    found = []
    for seed in range(BATCHES):
        whole, parts = step(depth, seed, IMAGES, False), step(depth, seed, size, accumulates)
        found.append([((a - b).norm() / b.norm()).item() for a, b in zip(parts, whole, strict=True)])
    return torch.tensor(found).mean(0).tolist()


def rows(depths: tuple[int, ...] = DEPTHS) -> list[str]:
    """Return the rows of the table."""
    shown: Callable[[float, float], str] = lambda plain, accumulated: f"{plain:.2f} | {accumulated:.2f}"  # noqa: E731
    lines = []
    for depth in depths:
        for size in SIZES:
            plain, accumulated = errors(depth, size, False), errors(depth, size, True)
            cells = [shown(a, b) for a, b in zip(plain, accumulated, strict=True)]
            lines.append(f"| {depth} | {IMAGES // size} of {size} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
