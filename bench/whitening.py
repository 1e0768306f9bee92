"""The command `python -m bench.whitening`: what whitening costs beside BatchNorm, and what it does to a signal.

Times are those of layers on this CPU, as multiples of BatchNorm's. The rest is arithmetic on signals
drawn at random with fixed seeds: channels whose covariance has the eigenvalues 1, 1/2, 1/3, ... in random directions.
It prints the tables that docs/variants.md quotes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastbn
from bench.machine import machine
from fastbn.cli.errors import require
from fastbn.measure.timer import Budget, HostClock, time_in_turns

METHODS = ("iternorm", "zca", "pca")
SHAPES = ((32, 64, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7))
GROUP_SIZES = (16, 64, 256, 512)
OPERATIONS = ("train_backward", "eval")
BUDGET = Budget(seconds=0.3, warm_up_seconds=0.05, min_rounds=11, max_rounds=51)
# Of the experiments: channels of a group, elements of a batch per channel, batches, and fixed samples.
CHANNELS, ELEMENTS, BATCHES, PROBES = (4, 16, 64), (32, 128, 512, 2048), 200, 64
NAMES = {"batch_norm": "BatchNorm", "iternorm": "IterNorm", "zca": "ZCA", "pca": "PCA"}


def whitening(channels: int, method: str, **options: Any) -> nn.Module:
    """Return a layer of (N, C), or (N, C, H, W) if `options` has "images", without parameters if it has "affine"."""
    cls: Any = fastbn.WhiteningBatchNorm2d if options.pop("images", False) else fastbn.WhiteningBatchNorm1d
    return cls(channels, method=method, **options)


def time_layers() -> Iterator[dict[str, Any]]:
    """Yield for each case and method its time over that of fastbn.BatchNorm2d: float32, contiguous, one thread.

    Calls take turns, and the shortest time of each counts: what else a shared machine does only adds to the others, and
    to the long calls of whitening more often than to BatchNorm's.
    """
    for shape in SHAPES:
        x, grad_out = (torch.randn(shape) for _ in range(2))
        for size in (size for size in GROUP_SIZES if size <= shape[1]):
            layers = [fastbn.BatchNorm2d(shape[1])]
            layers += [whitening(shape[1], method, group_size=size, images=True) for method in METHODS]
            for operation in OPERATIONS:
                calls = [_call(layer, operation, x, grad_out) for layer in layers]
                batch_norm, *samples = time_in_turns(calls, HostClock(), BUDGET)
                yield {
                    "shape": list(shape),
                    "group_size": size,
                    "operation": operation,
                    "batch_norm_us": round(1e6 * min(batch_norm), 1),
                    **{
                        method: round(min(each) / min(batch_norm), 2)
                        for method, each in zip(METHODS, samples, strict=True)
                    },
                }


def _call(layer: nn.Module, operation: str, x: Tensor, grad_out: Tensor) -> Callable[[], object]:
    """Return a training step without an optimiser, or an evaluation."""
    layer.train()(x)
    if operation == "eval":

        def evaluate() -> object:
            layer.eval()
            with torch.no_grad():
                return layer(x)

        return evaluate
    leaf = x.detach().requires_grad_()
    leaves = [leaf, *layer.parameters()]

    def train() -> object:
        layer.train()
        return torch.autograd.grad(layer(leaf), leaves, grad_out)

    return train


class Source(NamedTuple):
    """A distribution of vectors: normal, of mean 0, times `mix` [d, d], so that the covariance is mix mix^T."""

    mix: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, channels: int, seed: int = 0) -> Source:
        generator = torch.Generator().manual_seed(seed)
        directions, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))
        values = 1 / torch.arange(1, channels + 1, dtype=torch.float64)
        return cls(directions * values.sqrt(), generator)

    @property
    def cov(self) -> Tensor:
        return self.mix @ self.mix.mT

    def draw(self, elements: int) -> Tensor:
        """Return (elements, channels)."""
        normal = torch.randn(elements, len(self.mix), generator=self.generator, dtype=torch.float64)
        return normal @ self.mix.mT


def statistics_of(layer: nn.Module, batch: Tensor, probes: Tensor) -> Tensor:
    """Return what a layer with momentum 1 makes of `probes` by the statistics of `batch`."""
    with torch.no_grad():
        layer.train()(batch)
        return layer.eval()(probes)


def instability(outputs: Tensor) -> float:
    """Return the root mean square of (output - its mean over batches) over that of the output; outputs (batches, *).

    It is 0 where the output of a sample does not depend on the batch, and 1 where nothing of it stays.
    """
    return ((outputs - outputs.mean(0)).square().mean() / outputs.square().mean()).sqrt().item()


def measure_stochasticity() -> Iterator[dict[str, Any]]:
    """Yield how much the output of fixed samples changes from batch to batch."""
    for channels in CHANNELS:
        source = Source.of(channels)
        probes = source.draw(PROBES)
        layers = {"batch_norm": fastbn.BatchNorm1d(channels, momentum=1.0, affine=False, dtype=torch.float64)}
        for method in METHODS:
            layers[method] = whitening(channels, method, momentum=1.0, affine=False, dtype=torch.float64)
        for elements in ELEMENTS:
            batches = [source.draw(elements) for _ in range(BATCHES)]
            yield {
                "group_size": channels,
                "elements": elements,
                **{
                    name: round(instability(torch.stack([statistics_of(layer, b, probes) for b in batches])), 4)
                    for name, layer in layers.items()
                },
            }


def measure_averages(channels: int = 16) -> Iterator[dict[str, Any]]:
    """Yield how far two ways of averaging over batches are from whitening by the true covariance.

    "covariance" is what the layers do: the matrix of the averaged covariance. "matrix" averages the matrices of the
    batches. The error is that of the samples, as a root mean square over that of the exact output.
    """
    source = Source.of(channels, seed=1)
    probes = source.draw(PROBES)
    for elements in ELEMENTS:
        batches = [source.draw(elements) for _ in range(BATCHES)]
        record: dict[str, Any] = {"group_size": channels, "elements": elements}
        for method in METHODS:
            options = {"affine": False, "dtype": torch.float64}
            exact_layer = whitening(channels, method, **options).eval()
            exact_layer.running_cov.copy_(source.cov[None])
            exact = exact_layer(probes)
            average = whitening(channels, method, momentum=None, **options)
            single = whitening(channels, method, momentum=1.0, **options)
            # An evaluation is linear in the matrix, so that the average of outputs is the output of the average.
            identity = torch.cat([torch.zeros(1, channels), torch.eye(channels)]).double()
            matrices = torch.zeros(channels, channels, dtype=torch.float64)
            for batch in batches:
                average.train()(batch)
                columns = statistics_of(single, batch, identity)
                matrices += (columns[1:] - columns[0]) / len(batches)
            by_covariance = average.eval()(probes)
            by_matrix = (probes - average.running_mean) @ matrices
            for name, output in (("covariance", by_covariance), ("matrix", by_matrix)):
                error = ((output - exact).square().mean() / exact.square().mean()).sqrt().item()
                record[f"{method}_{name}"] = round(error, 4)
        yield record


def unexplained(target: Tensor, features: Tensor, channelwise: bool) -> float:
    """Return the fraction of the variance of `target` that least squares leave: by a scale and a shift per channel, or
    by a linear layer."""
    target, features = (t - t.mean(0) for t in (target, features))
    if channelwise:
        fitted = features * (features * target).sum(0) / features.square().sum(0)
    else:
        fitted = features @ torch.linalg.lstsq(features, target).solution
    return ((target - fitted).square().sum() / target.square().sum()).item()


def measure_expressiveness(elements: int = 4096) -> Iterator[dict[str, Any]]:
    """Yield what of the input no scale and shift, and no linear layer, can make of the normalised signal again."""
    for channels in CHANNELS:
        source = Source.of(channels, seed=2)
        x = source.draw(elements)
        layers: dict[str, nn.Module] = {"batch_norm": fastbn.BatchNorm1d(channels, affine=False, dtype=torch.float64)}
        layers |= {method: whitening(channels, method, affine=False, dtype=torch.float64) for method in METHODS}
        for name, layer in layers.items():
            y = layer(x)
            yield {
                "group_size": channels,
                "method": name,
                "scale_and_shift": round(unexplained(x, y, channelwise=True), 4),
                "linear_layer": round(unexplained(x, y, channelwise=False), 4),
            }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of docs/variants.md in Markdown, by what they tell."""
    made = {}
    for operation in OPERATIONS:
        rows = [
            [
                " x ".join(map(str, each["shape"])),
                each["group_size"],
                f"{each['batch_norm_us'] / 1e3:.2f}",
                *(f"{each[method]:.1f}" for method in METHODS),
            ]
            for each in results["times"]
            if each["operation"] == operation
        ]
        head = ["shape", "group size", "BatchNorm, ms", *(NAMES[method] for method in METHODS)]
        made[operation] = _table(head, rows)
    made["stochasticity"] = _table(
        ["group size", "elements per channel", *NAMES.values()],
        [
            [each["group_size"], each["elements"], *(f"{each[name]:.2f}" for name in NAMES)]
            for each in results["stochasticity"]
        ],
    )
    ways = [(method, way) for method in METHODS for way in ("covariance", "matrix")]
    made["averages"] = _table(
        ["elements per channel", *(f"{NAMES[method]}, {way}" for method, way in ways)],
        [
            [each["elements"], *(f"{each[f'{method}_{way}']:.3f}" for method, way in ways)]
            for each in results["averages"]
        ],
    )
    made["expressiveness"] = _table(
        ["group size", "normalised by", "left by scale and shift", "left by a linear layer"],
        [
            [
                each["group_size"],
                NAMES[each["method"]],
                f"{each['scale_and_shift']:.3f}",
                f"{each['linear_layer']:.3f}",
            ]
            for each in results["expressiveness"]
        ],
    )
    return made


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a figure: one sample's output in 100 batches, and the change from batch to batch by size of the batch.

    Raises CommandError where matplotlib is not installed.
    """
    pyplot = require("bench", "matplotlib", "matplotlib.pyplot")
    colours = dict(zip(NAMES, ("#0072B2", "#009E73", "#E69F00", "#D55E00"), strict=True))
    markers = dict(zip(NAMES, "osv^", strict=True))
    figure, axes = pyplot.subplots(1, 5, figsize=(14, 3.1), layout="constrained", width_ratios=[1, 1, 1, 1, 1.6])
    source = Source.of(16, seed=3)
    probe = source.draw(1)
    batches = [source.draw(64) for _ in range(100)]
    for axis, (name, title) in zip(axes, NAMES.items(), strict=False):
        options: dict[str, Any] = {"momentum": 1.0, "affine": False, "dtype": torch.float64}
        layer = fastbn.BatchNorm1d(16, **options) if name == "batch_norm" else whitening(16, name, **options)
        points = torch.cat([statistics_of(layer, batch, probe) for batch in batches])
        axis.scatter(points[:, 14], points[:, 15], s=9, color=colours[name], alpha=0.6, linewidths=0)
        axis.set(title=title, xlim=(-4, 4), ylim=(-4, 4), xlabel="channel 15", aspect="equal")
        axis.axhline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
        axis.axvline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("channel 16")
    records = [each for each in results["stochasticity"] if each["group_size"] == 16]
    for name, title in NAMES.items():
        axes[4].plot(
            [each["elements"] for each in records],
            [each[name] for each in records],
            color=colours[name],
            marker=markers[name],
            label=title,
        )
    axes[4].set(xscale="log", ylim=(0, 1.05), xlabel="elements per channel in a batch", ylabel="change of the output")
    axes[4].set_xticks(ELEMENTS, map(str, ELEMENTS))
    axes[4].minorticks_off()
    axes[4].legend(frameon=False, ncols=2, fontsize=8)
    axes[4].set_title("16 channels")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.whitening", description=__doc__.partition(":")[2])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and the machine to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them into FILE, as PNG or SVG")
    parser.add_argument("--load", type=Path, metavar="FILE", help="take the results from FILE instead of measuring")
    args = parser.parse_args()
    if args.load:
        results = json.loads(args.load.read_text())
    else:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        results = {
            "machine": machine(torch.device("cpu")),
            "times": list(time_layers()),
            "stochasticity": list(measure_stochasticity()),
            "averages": list(measure_averages()),
            "expressiveness": list(measure_expressiveness()),
        }
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.picture:
        draw(results, args.picture)
    print("\n\n".join(f"{name}\n\n{table}" for name, table in tables(results).items()))


if __name__ == "__main__":
    main()
