"""A convolution's bias before BatchNorm is wasted: it has no gradient and no effect, and the running mean absorbs it.

BatchNorm subtracts the mean of its input per channel, and with it whatever constant was added there: Ioffe and Szegedy,
"Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift" (2015), section 3.2.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from examples.gallery import training
from examples.gallery.style import BN, COLOURS, PLAIN, SKY, figure
from examples.lenet.data import Dataset

# `probe` images give gradients and outputs.
SETTINGS = {
    **{"images": 4000, "probe": 256, "batch": 64, "steps": 100, "lr": 0.1},
    "biases": [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0],
}


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Return, per convolution, the norm of its bias's gradient over that of its weight's."""
    model = copy.deepcopy(model)
    F.cross_entropy(model(images), labels).backward()
    return [(layer.bias.grad.norm() / layer.weight.grad.norm()).item() for layer in convolutions(model)]


def with_biases(model: nn.Module, size: float) -> nn.Module:
    """Return a copy of the model whose convolutions have biases drawn from a normal distribution times `size`."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in convolutions(model):
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * size)
    return model


def compute(data: Dataset, settings: dict) -> dict:
    images = training.Images(data, settings["images"])
    probe = images.train[: settings["probe"]], images.train_labels[: settings["probe"]]
    ratios: dict = {PLAIN: {}, BN: {}}
    models = {}
    for variant, norm in ((PLAIN, training.no_norm), (BN, training.batch_norm)):
        torch.manual_seed(0)
        models[variant] = training.vgg(norm)
        double = copy.deepcopy(models[variant]).double()
        ratios[variant]["float32"] = gradients(models[variant], *probe)
        ratios[variant]["float64"] = gradients(double, probe[0].double(), probe[1])
    return {
        "ratios": ratios,
        "outputs": {name: _outputs(model, probe[0], settings["biases"]) for name, model in models.items()},
        "absorbed": _absorbed(models[BN], images, settings),
    }


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor, biases: list[float]) -> list[float]:
    """Return, per size of the biases, the largest difference of logits over the largest logit, in training mode."""
    expected = model(images)
    differences = [(with_biases(model, size)(images) - expected).abs().max() for size in biases]
    return [(difference / expected.abs().max()).item() for difference in differences]


def _absorbed(model: nn.Module, images: training.Images, settings: dict) -> dict[str, list[float]]:
    """Return each channel's bias, and how far its running mean is from that of a twin that was trained without biases.

    Both are trained alike, in float64, so that their weights stay the same up to rounding. `losses` are the largest
    difference between theirs and `moved` the largest by which a bias moved.
    """
    plain, biased = copy.deepcopy(model).double(), with_biases(model, 1.0).double()
    initial = [layer.bias.detach().clone() for layer in convolutions(biased)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=settings["lr"]) for net in (plain, biased)]
    gaps = []
    for x, labels in images.batches(settings["batch"], settings["steps"], 0):
        losses = [training.step(net, opt, x.double(), labels) for net, opt in zip((plain, biased), optimizers)]
        gaps.append(abs(losses[0] - losses[1]))
    moved = [(layer.bias - bias).abs().max().item() for layer, bias in zip(convolutions(biased), initial, strict=True)]
    means = [_running_means(net) for net in (biased, plain)]
    logits = [net.eval()(images.test[: settings["probe"]].double()) for net in (plain, biased)]
    return {
        "bias": torch.cat(initial).tolist(),
        "running_mean": (means[0] - means[1]).tolist(),
        "losses": [max(gaps)],
        "moved": [max(moved)],
        "evaluation": [(logits[0] - logits[1]).abs().max().item()],
    }


def _running_means(model: nn.Module) -> Tensor:
    return torch.cat([layer.running_mean for layer in model.modules() if hasattr(layer, "running_mean")])


def slope(results: dict) -> float:
    """Return the part of a bias that is in the running mean after the steps: 1 - (1 - momentum)^steps."""
    return 1 - 0.9 ** results["settings"]["steps"]


def facts(results: dict) -> list[str]:
    rows = []
    for variant, by_dtype in results["ratios"].items():
        for dtype, ratios in by_dtype.items():
            rows.append(f"| gradient of the bias / of the weight, {variant}, {dtype} | {_span(ratios)} |")
    for variant, changes in results["outputs"].items():
        rows.append(f"| change of the output / output, {variant} | {_span(changes)} |")
    absorbed = results["absorbed"]
    rows.append(f"| loss with biases - without, float64, at most | {absorbed['losses'][0]:.0e} |")
    rows.append(f"| a bias moves by at most | {absorbed['moved'][0]:.0e} |")
    rows.append(f"| logits in evaluation, with biases - without, at most | {absorbed['evaluation'][0]:.0e} |")
    return rows


def _span(values: list[float]) -> str:
    return f"{min(values):.0e} to {max(values):.0e}"


def draw(results: dict) -> Figure:
    made = figure(8.2)
    above, middle, below = made.subplots(3, 1)
    for variant, by_dtype in results["ratios"].items():
        for dtype, marker in (("float32", "o"), ("float64", "D")):
            ratios, colour = by_dtype[dtype], COLOURS[variant]
            filled = colour if dtype == "float32" else "white"
            above.plot(range(1, len(ratios) + 1), ratios, marker, color=colour, markerfacecolor=filled)
            if (variant, dtype) != (PLAIN, "float64"):  # which lies on float32's
                label = f"{variant},\n{dtype}" if variant == BN else f"{variant},\neither dtype"
                above.text(len(ratios) + 0.25, ratios[-1], label, color=colour, va="center")
    above.set(yscale="log", xlabel="convolution", ylim=(1e-19, 1e2), xlim=(0.6, 7.8))
    above.set(title="norm of the bias's gradient / norm of the weight's", xticks=range(1, 7))
    above.set_yticks([1e-16, 1e-12, 1e-8, 1e-4, 1])
    biases = results["settings"]["biases"]
    for variant, outputs in results["outputs"].items():
        middle.plot(biases, outputs, "o-", color=COLOURS[variant])
        middle.text(biases[-1] * 2, outputs[-1], variant, color=COLOURS[variant], va="center")
    middle.set(xscale="log", yscale="log", xlabel="size of the biases", xlim=(biases[0] / 2, biases[-1] * 60))
    middle.set(title="change of the output / size of the output (float32)", xticks=biases)
    middle.set_yticks([1e-8, 1e-4, 1, 1e4])
    middle.xaxis.set_minor_locator(NullLocator())
    absorbed, steps = results["absorbed"], results["settings"]["steps"]
    ends = [min(absorbed["bias"]), max(absorbed["bias"])]
    below.plot(ends, ends, color=SKY, label="all of the bias")
    below.plot(absorbed["bias"], absorbed["running_mean"], ".", color=COLOURS[BN], label="a channel")
    below.set(xlabel="bias of the convolution", title=f"running mean with biases - without, after {steps} steps")
    below.legend(loc="upper left", handlelength=1.5)
    for axes in (above, middle, below):
        axes.grid()
    return made
