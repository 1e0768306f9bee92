"""Which learning rates train LeNet and a small VGG: without BatchNorm, with it, and with noise after it.

The noise follows Santurkar, Tsipras, Ilyas and Madry, "How Does Batch Normalization Help Optimization?" (2018), section
2: it moves the mean and the variance of every channel at every step, which is the internal covariate shift that
BatchNorm was said to remove.
"""

from __future__ import annotations

import math
import statistics

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

import fastbn
from examples.gallery import training
from examples.gallery.style import BN, COLOURS, MARKERS, NOISY, PLAIN, figure, legend_below
from examples.lenet.data import Dataset
from examples.lenet.experiment import lenet

SETTINGS = {
    "images": 4000,
    "test_images": 1000,
    "batch": 64,
    "steps": {"LeNet": 150, "VGG": 100},
    "lrs": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
    "seeds": 3,
    # What the noise draws from: a mean within +-mean and a scale from 1 to `scale` per channel and step, and about
    # these, per image, a mean within +-jitter and a scale with the standard deviation `jitter`.
    "mean": 0.5,
    "scale": 1.25,
    "jitter": 0.1,
}
# The mean loss of the last steps is the final one, and a net has trained if it classifies as many test images.
_LAST_STEPS = 20
TRAINED = 0.5
# How far up the axis of losses the marks of divergence stand, above all losses and so that none hides another.
_ABOVE = {PLAIN: 2.8, BN: 3.0, NOISY: 3.2}


class Noise(nn.Module):
    """Noise on (N, C, ...) float32 activations whose mean and variance per channel change at each step.

    In training y = s x + m, where m and s differ between images and their own means and scales are drawn again per
    channel and step. In evaluation y = (1 + scale) / 2 x, the mean over the draws.
    """

    def __init__(self, mean: float, scale: float, jitter: float):
        super().__init__()
        self.mean, self.scale, self.jitter = mean, scale, jitter

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * ((1 + self.scale) / 2)
        ones = (1,) * (x.dim() - 2)
        channel, image = (1, x.shape[1], *ones), (*x.shape[:2], *ones)
        mean = x.new_empty(channel).uniform_(-self.mean, self.mean)
        scale = x.new_empty(channel).uniform_(1, self.scale)
        mean = mean + x.new_empty(image).uniform_(-self.jitter, self.jitter)
        scale = scale + torch.randn(image, dtype=x.dtype) * self.jitter
        return x * scale + mean


def net(name: str, variant: str, noise: Noise) -> nn.Sequential:
    """Make LeNet with sigmoids, or the VGG: with BatchNorm before each activation, with noise after that, or neither.

    A net draws the same weights from torch's generator whatever its variant.
    """
    if name == "LeNet":
        model = lenet(variant != PLAIN)
    else:
        model = training.vgg(training.no_norm if variant == PLAIN else training.batch_norm)
    if variant == NOISY:
        for key, layer in list(model.named_children()):
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(model, key, nn.Sequential(layer, noise))
    return fastbn.convert(model)


class Watch:
    """The mean and variance per channel of what enters an activation in the middle of a net, batch after batch."""

    def __init__(self, model: nn.Sequential):
        activations = [i for i, layer in enumerate(model) if isinstance(layer, (nn.ReLU, nn.Sigmoid))]
        self._moments: list[tuple[Tensor, Tensor]] = []
        model[activations[len(activations) // 2] - 1].register_forward_hook(self._after)

    def shift(self) -> float | None:
        """Return how far the means moved in the second half: their standard deviation over that of the elements.

        It is None where nothing varies, in a net that is dead.
        """
        means, variances = (torch.stack(list(part)) for part in zip(*self._moments[len(self._moments) // 2 :]))
        spread = variances.mean(0).sqrt().mean().item()
        return means.std(0).mean().item() / spread if spread > 0 else None

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            values = output.detach().transpose(0, 1).flatten(1)
            self._moments.append((values.mean(1), values.var(1, correction=0)))


def run(name: str, variant: str, lr: float, seed: int, images: training.Images, settings: dict) -> dict:
    """Train a net. Returns its final training loss, test accuracy and shift (see `Watch`).

    Where the loss became infinite or NaN, loss and shift are None, and the accuracy is that of a guess.
    """
    torch.manual_seed(seed)
    noise = Noise(settings["mean"], settings["scale"], settings["jitter"])
    model = net(name, variant, noise)
    watch = Watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for batch in images.batches(settings["batch"], settings["steps"][name], seed):
        losses.append(training.step(model, optimizer, *batch))
        if not math.isfinite(losses[-1]):
            return {"loss": None, "accuracy": 0.1, "shift": None}
    test = training.accuracy(model.eval(), images.test, images.test_labels)
    return {"loss": statistics.mean(losses[-_LAST_STEPS:]), "accuracy": test, "shift": watch.shift()}


def compute(data: Dataset, settings: dict) -> dict:
    images = training.Images(data, settings["images"], settings["test_images"])
    runs: dict = {}
    for name in settings["steps"]:
        runs[name] = {}
        for variant in (PLAIN, BN, NOISY):
            by_measure: dict[str, list] = {"loss": [], "accuracy": [], "shift": []}
            for lr in settings["lrs"]:
                results = [run(name, variant, lr, seed, images, settings) for seed in range(settings["seeds"])]
                for measure, values in by_measure.items():
                    values.append([result[measure] for result in results])
            runs[name][variant] = by_measure
    return {"runs": runs}


def trained(results: dict, name: str, variant: str) -> list[float]:
    """Return the learning rates at which every seed classifies more than half of the test images."""
    accuracies = results["runs"][name][variant]["accuracy"]
    return [lr for lr, seeds in zip(results["settings"]["lrs"], accuracies, strict=True) if min(seeds) > TRAINED]


def shift(results: dict, name: str, variant: str) -> float:
    """Return the mean shift over the seeds, at the learning rate at which the accuracy is best."""
    runs = results["runs"][name][variant]
    best = max(range(len(runs["accuracy"])), key=lambda at: statistics.mean(runs["accuracy"][at]))
    return statistics.mean(value for value in runs["shift"][best] if value is not None)


def facts(results: dict) -> list[str]:
    rows = []
    for name, variants in results["runs"].items():
        for variant, runs in variants.items():
            lrs = trained(results, name, variant)
            best = max(statistics.mean(seeds) for seeds in runs["accuracy"])
            cells = [_span(lrs, results), f"{shift(results, name, variant):.3f}"] if lrs else ["none", "-"]
            rows.append(f"| {name} | {variant} | {cells[0]} | {best:.1%} | {cells[1]} |")
    return rows


def _span(lrs: list[float], results: dict) -> str:
    """Return the ends of the learning rates, and those of the settings between them that are missing."""
    missing = [f"{lr:g}" for lr in results["settings"]["lrs"] if lrs[0] < lr < lrs[-1] and lr not in lrs]
    return f"{lrs[0]:g} to {lrs[-1]:g}" + (f", not {' and '.join(missing)}" if missing else "")


def draw(results: dict) -> Figure:
    made = figure(6.2)
    lrs, ceiling = results["settings"]["lrs"], 2.6
    panels = made.subplots(2, len(results["runs"]), sharex=True, sharey="row", squeeze=False)
    for column, (name, variants) in enumerate(results["runs"].items()):
        losses, accuracies = panels[:, column]
        for variant, measures in variants.items():
            style = {"color": COLOURS[variant], "marker": MARKERS[variant], "label": variant}
            small = [[loss for loss in seeds if loss is not None and loss < ceiling] for seeds in measures["loss"]]
            _line(losses, lrs, small, style)
            diverged = [lr for lr, seeds in zip(lrs, small, strict=True) if len(seeds) < results["settings"]["seeds"]]
            if diverged:
                losses.plot(diverged, [_ABOVE[variant]] * len(diverged), "x", color=style["color"], markersize=8)
            _line(accuracies, lrs, measures["accuracy"], style)
        losses.set(title=name, xscale="log", ylim=(0, 3.35), yticks=[0, 0.5, 1, 1.5, 2, 2.5])
        accuracies.set(xlabel="learning rate", ylim=(0, 1))
        for axes in panels[:, column]:
            axes.grid()
    panels[0, 0].set_ylabel("training loss at the end")
    panels[1, 0].set_ylabel("test accuracy")
    panels[1, 0].yaxis.set_major_formatter(PercentFormatter(1))
    made.suptitle("How large a learning rate can be (x: a seed diverged)")
    legend_below(made, panels[0, 0], 3)
    return made


def _line(axes: Axes, lrs: list[float], by_lr: list[list[float]], style: dict) -> None:
    """Draw the mean over the seeds and their range, where there is any."""
    kept = [(lr, seeds) for lr, seeds in zip(lrs, by_lr, strict=True) if seeds]
    where = [lr for lr, _ in kept]
    axes.plot(where, [statistics.mean(seeds) for _, seeds in kept], **style)
    low, high = [min(seeds) for _, seeds in kept], [max(seeds) for _, seeds in kept]
    axes.fill_between(where, low, high, color=style["color"], alpha=0.15, linewidth=0)
