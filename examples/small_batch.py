"""Which normalisation survives small batches? A convolutional net, trained by each at batches of 2 to 64.

    python -m examples.small_batch --data /usr/share/datasets/fashion-mnist --out small_batch

Every run sees the same number of images in the same order from the same initial weights, with a learning rate
proportional to the batch that falls to 0 by a cosine, so that what differs is the noise of the statistics. Writes
results.json and accuracy.png: the test accuracy in evaluation mode, by method and batch, over some seeds. Without
--data the images are the digits that scikit-learn bundles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, NullLocator, PercentFormatter
from torch import Tensor, nn
from tqdm import tqdm

import fastbn
from examples.lenet.data import Dataset, load_digits, load_idx_directory

BATCHES = (2, 4, 8, 16, 32, 64)
CHANNELS = (16, 32, 64)
LR_PER_IMAGE = 0.05 / 32
# The part of the run after which "frozen" normalises by its running statistics: late, as Wu and Johnson (2021, section
# 4.2) do, since the layers before it have to have settled.
FROZEN_FROM = 0.75


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to normalise.

    layer: makes a layer of some channels, for a number of images in a batch and a number of steps of the run. freezes:
    whether the statistics are frozen on the way.
    """

    layer: Callable[[int, int, int], nn.Module]
    freezes: bool = False


def _renorm(channels: int, batch: int, steps: int) -> nn.Module:
    """Make a BatchRenorm whose bounds open as in the paper, scaled to the run: from an eighth of it to five eighths."""
    begin, end = steps // 8, steps * 5 // 8
    r_max, d_max = fastbn.nn.Ramp(begin, end, 1.0, 3.0), fastbn.nn.Ramp(begin, end, 0.0, 5.0)
    return fastbn.BatchRenorm2d(channels, r_max=r_max, d_max=d_max)


def _batch_norm(channels: int, batch: int, steps: int) -> nn.Module:
    return fastbn.BatchNorm2d(channels)


def _ghost(channels: int, batch: int, steps: int) -> nn.Module:
    return fastbn.GhostBatchNorm2d(channels, virtual_batch_size=max(batch // 4, 2))


METHODS = {
    "BatchNorm": Method(_batch_norm),
    "ghost, batch / 4": Method(_ghost),
    "renorm": Method(_renorm),
    "frozen after 3/4": Method(_batch_norm, freezes=True),
    "IterNorm, groups of 8": Method(lambda channels, batch, steps: fastbn.WhiteningBatchNorm2d(channels, group_size=8)),
    "LayerNorm": Method(lambda channels, batch, steps: nn.GroupNorm(1, channels)),
    "none": Method(lambda channels, batch, steps: nn.Identity()),
}
# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each.
_STYLES = dict(
    zip(
        METHODS,
        zip(("#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999"), "os^vDPX", strict=True),
        strict=True,
    )
)


def net(method: Method, batch: int, steps: int) -> nn.Sequential:
    """Make a net from (N, 1, 28, 28) float32 images to (N, 10) logits: three normalised convolutions of stride 2."""
    layers: list[nn.Module] = []
    for before, after in zip((1, *CHANNELS), CHANNELS):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), method.layer(after, batch, steps), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))


def train(data: Dataset, method: Method, batch: int, images: int, seed: int) -> nn.Module:
    """Train a net on `images` images, in batches of `batch`. A last smaller batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-images // len(data.train_labels))
    order = torch.cat([torch.randperm(len(data.train_labels), generator=generator) for _ in range(epochs)])[:images]
    steps = images // batch
    torch.manual_seed(seed)
    model = net(method, batch, steps).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR_PER_IMAGE * batch, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, index in enumerate(order[: steps * batch].split(batch)):
        if method.freezes and step == int(steps * FROZEN_FROM):
            fastbn.freeze(model, affine=False)
        optimizer.zero_grad()
        F.cross_entropy(model(pixels(data.train_images[index])), data.train_labels[index]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Return the fraction of the test images that a model classifies correctly; 0.1 is a guess."""
    logits = torch.cat([model(pixels(images)) for images in data.test_images.split(1000)])
    return (logits.argmax(1) == data.test_labels).double().mean().item()


def pixels(images: Tensor) -> Tensor:
    return images.float() / 255


def draw(path: Path, results: dict[str, dict[str, list[float]]], title: str) -> None:
    """Draw the mean accuracy over the seeds by batch, and its range."""
    figure = Figure(figsize=(8.5, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, by_batch in results.items():
        color, marker = _STYLES[name]
        batches = [int(batch) for batch in by_batch]
        axes.plot(
            batches, [statistics.mean(runs) for runs in by_batch.values()], marker, ls="-", color=color, label=name
        )
        axes.fill_between(
            batches, *zip(*((min(runs), max(runs)) for runs in by_batch.values())), color=color, alpha=0.12
        )
    axes.set(xscale="log", xlabel="images per batch", ylabel="test accuracy, evaluation mode")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MultipleLocator(0.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(title, parse_math=False, fontsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.small_batch", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of (Fashion-)MNIST's four IDX files")
    parser.add_argument("--out", type=Path, default=Path("small_batch"), help="default: small_batch")
    parser.add_argument("--images", type=int, default=12_000, help="images that a run trains on (default: 12000)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = load_idx_directory(args.data) if args.data else load_digits(0)
    torch.set_num_threads(1)  # tensors are small
    begin = time.perf_counter()
    results: dict[str, dict[str, list[float]]] = {name: {} for name in args.methods}
    runs = [(name, batch, seed) for batch in args.batches for name in args.methods for seed in range(args.seeds)]
    for name, batch, seed in tqdm(runs, unit="run"):
        model = train(data, METHODS[name], batch, args.images, seed)
        results[name].setdefault(str(batch), []).append(accuracy(model, data))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = dict(data=data.name, images=args.images, lr_per_image=LR_PER_IMAGE, torch=torch.__version__)
    settings["seconds"] = round(time.perf_counter() - begin)
    written = json.dumps({"settings": settings, "accuracy": results}, indent=1)
    (args.out / "results.json").write_text(written + "\n")
    title = f"{data.name}: {args.images} training images, {args.seeds} seeds"
    draw(args.out / "accuracy.png", results, title)
    print("| | " + " | ".join(str(batch) for batch in args.batches) + " |")
    print("|---|" + "---|" * len(args.batches))
    for name, by_batch in results.items():
        print(f"| {name} | " + " | ".join(f"{statistics.mean(values):.1%}" for values in by_batch.values()) + " |")


if __name__ == "__main__":
    main()
