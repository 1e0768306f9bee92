"""The gap between training and evaluation mode by batch size: one net, the same test images, three kinds of statistics.

The nets are trained as in `examples.small_batch`. What the statistics of a small batch cost is the subject of Wu and
Johnson, "Rethinking 'Batch' in BatchNorm" (2021), sections 3 and 4.
"""

from __future__ import annotations

import copy
import statistics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from torch import Tensor, nn

import fastbn
from examples import small_batch
from examples.gallery.style import GREEN, PURPLE, VERMILION, figure, legend_below
from examples.lenet.data import Dataset

SETTINGS = {"images": 6000, "test_images": 2000, "batches": [2, 4, 8, 16, 32, 64], "seeds": 3}
BATCH, RUNNING, POPULATION = "the batch's (train mode)", "running (eval mode)", "of 2000 training images"
_STYLES = {BATCH: (PURPLE, "s"), RUNNING: (VERMILION, "o"), POPULATION: (GREEN, "^")}
_POPULATION_IMAGES = 2000


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> dict[str, float]:
    """Return the mean loss and the accuracy of a copy of the model, in the mode in which it is, batch by batch.

    A last smaller batch is left out.
    """
    model = copy.deepcopy(model)  # a forward in training mode moves running statistics
    kept = len(images) // batch * batch
    logits = torch.cat([model(part) for part in images[:kept].split(batch)])
    truth = labels[:kept]
    return {
        "loss": F.cross_entropy(logits, truth).item(),
        "accuracy": (logits.argmax(1) == truth).double().mean().item(),
    }


def compute(data: Dataset, settings: dict) -> dict:
    test, labels = (part[: settings["test_images"]] for part in (data.test_images, data.test_labels))
    test = small_batch.pixels(test)
    loader = small_batch.pixels(data.train_images[:_POPULATION_IMAGES]).split(500)
    runs: dict = {name: {"loss": [], "accuracy": []} for name in _STYLES}
    for batch in settings["batches"]:
        found: dict = {name: [] for name in _STYLES}
        for seed in range(settings["seeds"]):
            model = small_batch.train(data, small_batch.METHODS["BatchNorm"], batch, settings["images"], seed)
            found[BATCH].append(measure(model.train(), test, labels, batch))
            found[RUNNING].append(measure(model.eval(), test, labels, batch))
            fastbn.population_stats(model, loader, progress=False)
            found[POPULATION].append(measure(model.eval(), test, labels, batch))
        for name, results in found.items():
            for what in ("loss", "accuracy"):
                runs[name][what].append([result[what] for result in results])
    return {"runs": runs}


def facts(results: dict) -> list[str]:
    lines = []
    for number, batch in enumerate(results["settings"]["batches"]):
        means = [statistics.mean(results["runs"][name]["accuracy"][number]) for name in _STYLES]
        lines.append(f"| {batch} | " + " | ".join(f"{mean:.1%}" for mean in means) + " |")
    return lines


def draw(results: dict) -> Figure:
    made = figure(6.6)
    panels = made.subplots(2, 1, sharex=True)
    batches = results["settings"]["batches"]
    for axes, what in zip(panels, ("accuracy", "loss"), strict=True):
        for name, (colour, marker) in _STYLES.items():
            seeds = results["runs"][name][what]
            axes.plot(batches, [statistics.mean(runs) for runs in seeds], color=colour, marker=marker, label=name)
            low, high = [min(runs) for runs in seeds], [max(runs) for runs in seeds]
            axes.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.grid()
    panels[0].set(xscale="log", ylabel="test accuracy", title="One net, test images, by the statistics that it uses")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[1].set(ylabel="test loss", xlabel="images per batch, in training and in train mode")
    panels[1].set_xticks(batches, [str(batch) for batch in batches])
    panels[1].xaxis.set_minor_locator(NullLocator())
    legend_below(made, panels[0], 1)
    return made
