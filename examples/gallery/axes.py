"""Which elements of a tensor share the statistics of one of them, under each kind of normalisation.

Nothing is drawn by hand: autograd gives the derivative of one output with respect to every input, and an input counts
where that is not zero. Wu and He, "Group Normalization" (2018), figure 2, has these sets as axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastbn
from examples.gallery.style import BLACK, SKY, VERMILION, figure
from examples.lenet.data import Dataset

# Images, channels, height and width of the tensor, and the element that is looked at.
SETTINGS = {"shape": [4, 6, 3, 3], "element": [1, 2, 1, 1]}


class _ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of each position, as transformers and ConvNeXt have it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


# A layer for tensors of a shape (N, C, H, W), by its name in the picture.
LAYERS: dict[str, Callable[[list[int]], nn.Module]] = {
    "BatchNorm, training": lambda shape: fastbn.BatchNorm2d(shape[1]).train(),
    "BatchNorm, evaluation": lambda shape: fastbn.BatchNorm2d(shape[1]).eval(),
    "LayerNorm over C, H, W": lambda shape: nn.LayerNorm(shape[1:]),
    "LayerNorm over C": lambda shape: _ChannelLayerNorm(shape[1]),
    "GroupNorm, 2 groups": lambda shape: nn.GroupNorm(2, shape[1]),
    "InstanceNorm": lambda shape: nn.InstanceNorm2d(shape[1]),
}


def shared(layer: nn.Module, shape: list[int], element: list[int]) -> Tensor:
    """Return a bool tensor of a shape: which inputs one element of a float64 layer's output depends on."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = layer.double()(x)
    (gradient,) = torch.autograd.grad(output[tuple(element)], x)
    # The derivatives that are not zero are some 1 / n; rounding in those that are gives no more than 1e-15.
    return gradient.abs() > 1e-9


def compute(data: Dataset, settings: dict) -> dict:
    shape, element = settings["shape"], settings["element"]
    return {"shared": {name: shared(make(shape), shape, element).int().tolist() for name, make in LAYERS.items()}}


def facts(results: dict) -> list[str]:
    counts = {name: int(torch.tensor(mask).sum()) for name, mask in results["shared"].items()}
    return [f"| {name} | {count} |" for name, count in counts.items()]


def draw(results: dict) -> Figure:
    made = figure(8.0)
    panels = made.subplots(3, 2)
    images, channels, height, width = results["settings"]["shape"]
    image, channel, row, column = results["settings"]["element"]
    for axes, (name, mask) in zip(panels.flat, results["shared"].items(), strict=True):
        # One row of tiles per image and one column per channel, with a gap between tiles.
        canvas = torch.full((images * (height + 1) - 1, channels * (width + 1) - 1), torch.nan)
        for n in range(images):
            for c in range(channels):
                top, left = n * (height + 1), c * (width + 1)
                canvas[top : top + height, left : left + width] = torch.tensor(mask[n][c])
        canvas[image * (height + 1) + row, channel * (width + 1) + column] = 2
        axes.pcolormesh(
            canvas.numpy(), cmap=ListedColormap(["#E8E8E8", SKY, VERMILION]), vmin=0, vmax=2, edgecolor="white", lw=0.6
        )
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_title(name, color=BLACK)
        axes.set_xticks([c * (width + 1) + width / 2 for c in range(channels)], range(channels))
        axes.set_yticks([n * (height + 1) + height / 2 for n in range(images)], range(images))
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("image")
    for axes in panels[-1]:
        axes.set_xlabel("channel")
    made.suptitle("Coloured: what the output of the red element depends on")
    return made
