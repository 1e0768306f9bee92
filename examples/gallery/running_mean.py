"""The running mean as a Kalman filter: momentum=None and constant momenta, on a mean that stays and on one that drifts.

A batch's mean is a noisy measurement of the true mean, and running statistics are the estimate: new estimate = old
estimate + gain (measurement - old estimate), the update of Kalman, "A New Approach to Linear Filtering and Prediction
Problems" (1960), for one number. docs/gallery.md derives the gains.
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastbn
from examples.gallery.style import BLACK, GREEN, GREY, ORANGE, SKY, VERMILION, figure
from examples.lenet.data import Dataset

# `channels` streams run at once, each a channel of one layer. The drift is such that `optimal` is its best gain.
SETTINGS = {"steps": 300, "batch": 8, "channels": 512, "momenta": [None, 0.01, 0.1, 0.5], "optimal": 0.1}
STAYS, DRIFTS = "the mean stays", "the mean drifts"
_STYLES = {
    "None": (GREEN, "momentum=None"),
    "0.01": (ORANGE, "momentum=0.01"),
    "0.1": (VERMILION, "momentum=0.1"),
    "0.5": (SKY, "momentum=0.5"),
}
_EXAMPLE = "example"


def steady_gain(ratio: float) -> float:
    """Return the Kalman gain that a random walk settles at.

    `ratio` is the variance of a step of the walk over that of a measurement, q / r. The gain K solves
    K^2 + ratio K - ratio = 0.
    """
    return (math.sqrt(ratio * ratio + 4 * ratio) - ratio) / 2


def ratio_for(gain: float) -> float:
    """Return q / r of the random walk whose steady gain is `gain`: the inverse of `steady_gain`."""
    return gain * gain / (1 - gain)


def steady_error(gain: float, ratio: float) -> float:
    """Return the root mean square error that a constant gain settles at, in standard deviations of a measurement."""
    return math.sqrt((gain * gain + (1 - gain) ** 2 * ratio) / (1 - (1 - gain) ** 2))


def streams(data: Dataset, settings: dict, drift: float) -> tuple[Tensor, Tensor]:
    """Return batches (steps, batch, channels) of the brightness of images drawn at random, and their true means.

    Brightness is the mean of an image's pixels, from 0 to 1. To every image of a step a random walk is added, whose
    steps have the standard deviation `drift`. The means, (steps, channels), are that of all images and the walk's.
    """
    brightness = data.train_images.flatten(1).double().mean(1) / 255
    generator = torch.Generator().manual_seed(0)
    steps, batch, channels = settings["steps"], settings["batch"], settings["channels"]
    drawn = brightness[torch.randint(len(brightness), (steps, batch, channels), generator=generator)]
    walk = torch.randn(steps, channels, generator=generator, dtype=torch.float64).mul(drift).cumsum(0)
    return drawn + walk[:, None], brightness.mean() + walk


def estimates(batches: Tensor, momentum: float | None) -> Tensor:
    """Return the running means (steps, channels) of a BatchNorm1d that is given the batches one after the other."""
    layer = fastbn.BatchNorm1d(batches.shape[2], momentum=momentum, affine=False, dtype=torch.float64)
    means = []
    with torch.no_grad():
        for batch in batches:
            layer(batch)
            means.append(layer.running_mean.clone())
    return torch.stack(means)


def compute(data: Dataset, settings: dict) -> dict:
    brightness = data.train_images.flatten(1).double().mean(1) / 255
    noise = (brightness.var() / settings["batch"]).sqrt().item()
    ratio = ratio_for(settings["optimal"])
    numbers: dict = {"noise": noise, "ratio": ratio, "error": {}, _EXAMPLE: {}}
    for name, drift in ((STAYS, 0.0), (DRIFTS, noise * math.sqrt(ratio))):
        batches, truth = streams(data, settings, drift)
        errors, example = {}, {"truth": truth[:, 0].tolist(), "measured": batches[:, :, 0].mean(1).tolist()}
        for momentum in settings["momenta"]:
            means = estimates(batches, momentum)
            errors[str(momentum)] = ((means - truth).square().mean(1).sqrt() / noise).tolist()
            example[str(momentum)] = means[:, 0].tolist()
        numbers["error"][name] = errors
        numbers[_EXAMPLE][name] = example
    return numbers


def final(results: dict, stream: str, momentum: str) -> float:
    """Return the error in the mean over the last third of the steps, in standard deviations of a batch's mean."""
    errors = results["error"][stream][momentum]
    last = errors[len(errors) * 2 // 3 :]
    return math.sqrt(sum(error * error for error in last) / len(last))


def facts(results: dict) -> list[str]:
    lines = []
    for momentum in results["error"][STAYS]:
        cells = [f"{final(results, stream, momentum):.2f}" for stream in (STAYS, DRIFTS)]
        lines.append(f"| {momentum} | {' | '.join(cells)} |")
    return lines


def draw(results: dict) -> Figure:
    made = figure(7.6)
    panels = made.subplots(2, 2, sharex=True, sharey="row")
    noise = results["noise"]
    for column, (name, errors) in enumerate(results["error"].items()):
        example, (above, below) = results[_EXAMPLE][name], panels[:, column]
        steps = range(1, len(example["truth"]) + 1)
        above.plot(steps, example["measured"], ".", color=GREY, markersize=2.5, label="mean of a batch")
        above.plot(steps, example["truth"], color=BLACK, linewidth=1.4, label="true mean")
        ratio = results["ratio"] if name == DRIFTS else 0.0
        for momentum, error in reversed(errors.items()):  # the noisiest line lies below the others
            colour, label = _STYLES[momentum]
            above.plot(steps, example[momentum], color=colour, linewidth=0.8 if momentum == "0.5" else 1.4)
            below.plot(steps, error, color=colour, label=label)
            if momentum != "None":
                below.axhline(steady_error(float(momentum), ratio), color=colour, linestyle=":", linewidth=1.2)
        if name == STAYS:
            below.plot(steps, [1 / math.sqrt(step) for step in steps], color=GREEN, linestyle=":", linewidth=1.2)
        above.set_title(name)
        below.set(yscale="log", xlabel="step", ylim=(0.04, 4))
        for axes in (above, below):
            axes.grid()
    low = min(min(example["truth"] + example["measured"]) for example in results[_EXAMPLE].values())
    panels[0, 0].set(ylabel="brightness, one stream", ylim=(low - noise, None))
    panels[1, 0].set_ylabel("error / noise of a batch (dotted: theory)", fontsize=10)
    above, below = (axes.get_legend_handles_labels() for axes in panels[:, 0])
    handles, labels = (first + second[::-1] for first, second in zip(above, below, strict=True))
    made.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=2)
    return made
