"""What enters each ReLU of a net of ten convolutions: at initialisation and after training, with and without BatchNorm.

Without BatchNorm there are two initialisations: torch's default, by which values shrink from layer to layer, and that
of He, Zhang, Ren and Sun, "Delving Deep into Rectifiers" (2015), which is made to keep their size.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.gallery import training
from examples.gallery.style import BN, COLOURS, GREY, PLAIN, SKY, figure
from examples.lenet.data import Dataset

# `probe` test images are what the histograms are taken of.
SETTINGS = {
    "images": 4000,
    "batch": 64,
    "steps": 400,
    "lr": 0.02,
    "layers": 10,
    "channels": 16,
    "seeds": 3,
    "probe": 256,
}
HE = "without BN, He's init"
BINS, LIMIT = 60, 3.0
_LABELS = {
    PLAIN: "without BN,\ntorch's default init",
    HE: "without BN,\nHe's init",
    BN: "with BN,\ntorch's default init",
}
_COLOURS = {**COLOURS, HE: SKY}


def net(variant: str, layers: int, channels: int) -> nn.Sequential:
    """Make a net from (N, 1, 14, 14) float32 images to (N, 10) logits: 3x3 convolutions of equal width."""
    norm = training.batch_norm if variant == BN else training.no_norm
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [nn.Conv2d(channels if layer else 1, channels, 3, padding=1), norm(channels), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return training.he_initialised(model) if variant == HE else model


@torch.no_grad()
def layers_of(model: nn.Sequential, images: Tensor) -> dict[str, list]:
    """Return of each layer the histogram of what enters its ReLU, and how much a channel varies.

    The histogram has BINS equal bins from -LIMIT to LIMIT, each with the fraction of all elements. `std` is the
    standard deviation of a channel over images and positions, in the mean over the channels: what BatchNorm sets to its
    weight.
    The model stays in training mode, so that its statistics are the batch's.
    """
    histograms, stds = [], []
    x = images
    for layer in model:
        if isinstance(layer, nn.ReLU):
            counts = torch.histc(x, BINS, -LIMIT, LIMIT) / x.numel()
            histograms.append([round(fraction, 5) for fraction in counts.tolist()])
            stds.append(x.transpose(0, 1).flatten(1).std(1).mean().item())
        x = layer(x)
    return {"histogram": histograms, "std": stds}


@torch.no_grad()
def between_images(model: nn.Sequential, images: Tensor) -> list[float]:
    """Return of each layer how much what enters its ReLU varies between images: its mean standard deviation there.

    It is taken at each position of each channel. `std` also has what differs between positions, such as the effect of
    padding at an image's edge.
    """
    stds = []
    x = images
    for layer in model:
        if isinstance(layer, nn.ReLU):
            stds.append(x.std(0).mean().item())
        x = layer(x)
    return stds


def compute(data: Dataset, settings: dict) -> dict:
    images = training.Images(data, settings["images"])
    small = [F.avg_pool2d(part, 2) for part in (images.train, images.test)]
    images.train, images.test = small
    seen = images.test[: settings["probe"]]
    runs: dict = {variant: {"accuracy": [], "between": [], "start": [], "trained": []} for variant in (PLAIN, HE, BN)}
    for variant, numbers in runs.items():
        for seed in range(settings["seeds"]):
            torch.manual_seed(seed)
            model = net(variant, settings["layers"], settings["channels"])
            numbers["start"].append(layers_of(model, seen))
            numbers["between"].append(between_images(model, seen))
            optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"])
            for batch in images.batches(settings["batch"], settings["steps"], seed):
                training.step(model, optimizer, *batch)
            numbers["trained"].append(layers_of(model, seen))
            numbers["accuracy"].append(training.accuracy(model.eval(), images.test, images.test_labels))
        for when in ("start", "trained"):
            # Histograms of the first seed are drawn; the others' would be as large again.
            numbers[when] = {
                "histogram": numbers[when][0]["histogram"],
                "std": [result["std"] for result in numbers[when]],
            }
    return {"runs": runs}


def std(results: dict, variant: str, when: str, layer: int) -> float:
    """Return `std` of a layer, counted from 0, in the mean over the seeds; `when` is "start" or "trained"."""
    return statistics.mean(by_layer[layer] for by_layer in results["runs"][variant][when]["std"])


def facts(results: dict) -> list[str]:
    lines = []
    for variant, numbers in results["runs"].items():
        first, last = (std(results, variant, "start", layer) for layer in (0, -1))
        after = std(results, variant, "trained", -1)
        mean, low, high = (f(numbers["accuracy"]) for f in (statistics.mean, min, max))
        lines.append(f"| {variant} | {first:.2g} | {last:.2g} | {after:.2g} | {mean:.1%} ({low:.1%} to {high:.1%}) |")
    return lines


def draw(results: dict) -> Figure:
    made = figure(8.4)
    panels = made.subplots(2, 3, sharex=True, sharey=True)
    layers = results["settings"]["layers"]
    width = 2 * LIMIT / BINS
    middles = [-LIMIT + (index + 0.5) * width for index in range(BINS)]
    for column, (variant, numbers) in enumerate(results["runs"].items()):
        for row, when in enumerate(("start", "trained")):
            axes = panels[row, column]
            for layer, fractions in enumerate(numbers[when]["histogram"]):
                base = layers - layer
                heights = [base + 0.85 * fraction / max(fractions) for fraction in fractions]
                axes.fill_between(middles, base, heights, step="mid", color=_COLOURS[variant], alpha=0.75, linewidth=0)
                axes.axhline(base, color=GREY, linewidth=0.5)
                value = numbers[when]["std"][0][layer]
                axes.text(LIMIT * 0.98, base + 0.32, f"{value:.2g}", ha="right", fontsize=9.5)
            axes.set(xlim=(-LIMIT, LIMIT), ylim=(1, layers + 1.05), xticks=[-2, 0, 2])
            axes.set_yticks([layers - layer + 0.3 for layer in range(layers)], [str(n + 1) for n in range(layers)])
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        panels[0, column].set_title(_LABELS[variant], fontsize=10.5)
        panels[1, column].set_title(f"test accuracy {statistics.mean(numbers['accuracy']):.0%}", fontsize=10.5)
    panels[0, 0].set_ylabel("layer, at initialisation")
    panels[1, 0].set_ylabel(f"layer, after {results['settings']['steps']} steps")
    panels[1, 1].set_xlabel("what enters the ReLU (number: its standard deviation in a channel)")
    return made
