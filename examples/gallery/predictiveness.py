"""How far the gradient can be trusted: loss and gradient along it, for the small VGG with and without BatchNorm.

At some steps of training the net goes from its weights w to w - s g, for the gradient g and steps s from half to four
times the learning rate, and the loss and the gradient there are taken, on the same batch: Santurkar, Tsipras, Ilyas and
Madry, "How Does Batch Normalization Help Optimization?" (2018), figure 4.
"""

from __future__ import annotations

import copy
import statistics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.gallery import training
from examples.gallery.style import BN, COLOURS, PLAIN, figure, legend_below
from examples.lenet.data import Dataset

SETTINGS = {
    "images": 4000,
    "test_images": 2000,
    "batch": 64,
    "steps": 100,
    "every": 5,
    "lrs": [0.03, 0.1],
    "multiples": [0.5, 1.0, 2.0, 3.0, 4.0],
    "seeds": 3,
}
# What a probe gives, by the label of its axis and the words of the table.
_TITLES = {
    "loss": ("loss along the gradient", "range of the loss"),
    "distance": ("change of the gradient", "change of the gradient"),
    "smoothness": ("change per distance, largest", "change of the gradient per distance"),
}


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    """Return the loss and its gradient, a tensor per parameter."""
    loss = F.cross_entropy(model(images), labels)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def probe(model: nn.Module, images: Tensor, labels: Tensor, steps: list[float]) -> dict[str, list[float]]:
    """Return the lowest and the highest of what steps along the negative gradient change. The model stays as it is.

    loss: the loss there. distance: how far the gradient there is from the gradient here, as a norm. smoothness: that
    over the length of the step; its largest value is the paper's effective beta-smoothness.
    """
    _, here = gradient(copy.deepcopy(model), images, labels)
    norm = _norm(here)
    found: dict[str, list[float]] = {measure: [] for measure in _TITLES}
    for step in steps:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, slope in zip(moved.parameters(), here, strict=True):
                parameter -= step * slope
        loss, there = gradient(moved, images, labels)
        distance = _norm([a - b for a, b in zip(there, here, strict=True)])
        found["loss"].append(loss)
        found["distance"].append(distance)
        found["smoothness"].append(distance / (step * norm))
    return {measure: [min(values), max(values)] for measure, values in found.items()}


def run(variant: str, lr: float, seed: int, images: training.Images, settings: dict) -> dict:
    """Train a VGG and probe it on the way. Returns its test accuracy and, for each measure, a pair per probe."""
    torch.manual_seed(seed)
    model = training.vgg(training.batch_norm if variant == BN else training.no_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    lengths = [lr * multiple for multiple in settings["multiples"]]
    ranges: dict[str, list] = {measure: [] for measure in _TITLES}
    for number, batch in enumerate(images.batches(settings["batch"], settings["steps"], seed)):
        if number % settings["every"] == 0:
            for measure, pair in probe(model, *batch, lengths).items():
                ranges[measure].append(pair)
        training.step(model, optimizer, *batch)
    return {"accuracy": training.accuracy(model.eval(), images.test, images.test_labels), **ranges}


def compute(data: Dataset, settings: dict) -> dict:
    images = training.Images(data, settings["images"], settings["test_images"])
    return {
        "runs": {
            str(lr): {
                variant: [run(variant, lr, seed, images, settings) for seed in range(settings["seeds"])]
                for variant in (PLAIN, BN)
            }
            for lr in settings["lrs"]
        }
    }


def widest(results: dict, lr: float, variant: str, measure: str) -> list[float]:
    """Return, per seed, the median over the probes of the largest value along the gradient; of `loss`, the range's."""
    values = []
    for run in results["runs"][str(lr)][variant]:
        spans = [high - low if measure == "loss" else high for low, high in run[measure]]
        values.append(statistics.median(spans))
    return values


def facts(results: dict) -> list[str]:
    lines = []
    for lr, variants in results["runs"].items():
        for measure, (_, words) in _TITLES.items():
            cells = []
            for variant in variants:
                values = widest(results, float(lr), variant, measure)
                cells.append(f"{statistics.mean(values):.2g} ({min(values):.2g} to {max(values):.2g})")
            lines.append(f"| {lr} | {words} | {' | '.join(cells)} |")
        accuracies = [statistics.mean(run["accuracy"] for run in runs) for runs in variants.values()]
        lines.append(f"| {lr} | test accuracy | {' | '.join(f'{value:.1%}' for value in accuracies)} |")
    return lines


def draw(results: dict) -> Figure:
    made = figure(7.6)
    settings = results["settings"]
    panels = made.subplots(len(_TITLES), len(settings["lrs"]), sharex=True, sharey="row", squeeze=False)
    at = range(0, settings["steps"], settings["every"])
    for column, (lr, variants) in enumerate(results["runs"].items()):
        for row, (measure, (label, _)) in enumerate(_TITLES.items()):
            axes = panels[row, column]
            panels[row, 0].set_ylabel(label, fontsize=10)
            for variant, runs in variants.items():
                ranges = list(zip(*(run[measure] for run in runs), strict=True))
                low = [statistics.mean(seed[0] for seed in seeds) for seeds in ranges]
                high = [statistics.mean(seed[1] for seed in seeds) for seeds in ranges]
                colour = COLOURS[variant]
                axes.plot(at, high, color=colour, linewidth=1.4, label=variant)
                if measure != "smoothness":
                    axes.plot(at, low, color=colour, linewidth=1.4)
                    axes.fill_between(at, low, high, color=colour, alpha=0.35, linewidth=0)
            axes.grid()
            if measure == "smoothness":
                axes.set_ylim(0, None)
            else:
                axes.set_yscale("log")
        panels[0, column].set_title(f"learning rate {lr}")
        panels[-1, column].set_xlabel("step of training")
    legend_below(made, panels[0, 0], 2)
    return made


def _norm(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
