"""Prints docs/models.md: what fastbn.convert makes of models of torchvision, timm, transformers and others.

    python -m docs.models [name ...] > docs/models.md

Models have random weights, and those whose package is not installed are left out, with a line that says so. It takes
half an hour on two idle cores, since each model's training step is timed.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastbn
from bench.machine import machine
from fastbn import functional
from fastbn.measure import timer
from fastbn.measure.timer import Budget

BUDGET = Budget(seconds=3.0, warm_up_seconds=0.3, min_rounds=7)


@dataclass
class Model:
    """How to build a model and its inputs."""

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


@dataclass
class Row:
    """What a table says of a model. Calls are those of one evaluation."""

    model: Model
    layers: int = 0
    left: Counter[str] = field(default_factory=Counter)
    fusable: int = 0
    fused: Counter[str] = field(default_factory=Counter)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    speedup: float = float("nan")

    @property
    def fused_calls(self) -> int:
        return sum(count for kind, count in self.fused.items() if kind)


def images(size: int = 64, channels: int = 3, batch: int = 4) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(batch, channels, size, size),)


def torchvision_models() -> Iterator[Model]:
    from torchvision import models

    options = {"inception_v3": {"init_weights": False, "aux_logits": False}, "googlenet": {"init_weights": False}}
    for name in (
        "resnet18 resnet50 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small "
        "efficientnet_b0 efficientnet_v2_s mnasnet0_5 shufflenet_v2_x0_5 googlenet inception_v3 regnet_x_400mf "
        "regnet_y_400mf vgg11_bn"
    ).split():
        build = functools.partial(getattr(models, name), **options.get(name, {}))
        yield Model("torchvision", name, build, images(96 if name == "inception_v3" else 64))
    for name in ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        build = functools.partial(getattr(models.segmentation, name), weights=None, weights_backbone=None)
        yield Model("torchvision", name, build, images(64))
    for name in ("r3d_18", "r2plus1d_18"):
        builder = getattr(models.video, name)
        yield Model("torchvision", name, builder, lambda: (torch.randn(2, 3, 4, 32, 32),))

    def backbone() -> nn.Module:
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        return resnet_fpn_backbone(backbone_name="resnet18", weights=None)

    yield Model("torchvision", "resnet18_fpn, frozen BN", backbone, images(64))


def timm_models() -> Iterator[Model]:
    import timm

    for name in (
        "resnet26d resnest14d seresnet18 skresnet18 res2net50_14w_8s regnetx_002 regnety_002 efficientnet_b0 "
        "mobilenetv3_small_050 mixnet_s densenet121 dla34 hrnet_w18_small cspresnet50 darknet53 ghostnet_050 "
        "inception_v4 xception41 repvgg_a0 rexnet_100 selecsls42 ese_vovnet19b_dw gernet_s mobileone_s0 repvit_m0_9 "
        "levit_128s lcnet_050 convmixer_768_32 fbnetc_100 dpn48b"
    ).split():
        size = {"inception_v4": 96, "levit_128s": 224, "convmixer_768_32": 56}.get(name, 64)
        batch = 2 if name == "levit_128s" else 4
        yield Model(
            "timm", name, lambda name=name: timm.create_model(name, pretrained=False), images(size, batch=batch)
        )


def transformers_models() -> Iterator[Model]:
    import transformers as hf

    small = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    for name, build in (
        ("ResNetModel", lambda: hf.ResNetModel(hf.ResNetConfig(**small))),
        ("RegNetModel", lambda: hf.RegNetModel(hf.RegNetConfig(**small, groups_width=8))),
        ("MobileNetV1Model", lambda: hf.MobileNetV1Model(hf.MobileNetV1Config(depth_multiplier=0.25))),
        ("MobileNetV2Model", lambda: hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.25))),
        (
            "EfficientNetModel",
            lambda: hf.EfficientNetModel(hf.EfficientNetConfig(width_coefficient=0.5, hidden_dim=640)),
        ),
    ):
        yield Model("transformers", name, build, images(64))


def geometric_models() -> Iterator[Model]:
    from torch_geometric.nn.models import GCN, GIN

    def graph() -> tuple[Tensor, Tensor]:
        return torch.randn(40, 8), torch.randint(0, 40, (2, 160))

    for model in (GIN, GCN):
        yield Model("torch_geometric", model.__name__, lambda model=model: model(8, 16, 3, norm="batch_norm"), graph)


def segmentation_models() -> Iterator[Model]:
    import segmentation_models_pytorch as smp

    for name in ("Unet", "FPN", "DeepLabV3Plus", "Linknet"):
        model = getattr(smp, name)
        yield Model(
            "segmentation_models_pytorch",
            f"{name}, resnet18",
            lambda model=model: model("resnet18", encoder_weights=None),
            images(64),
        )


def ultralytics_models() -> Iterator[Model]:
    from ultralytics.nn.tasks import DetectionModel

    for name in ("yolov8n", "yolo11n"):
        yield Model("ultralytics", name, lambda name=name: DetectionModel(f"{name}.yaml", verbose=False), images(64))


def plain_models() -> Iterator[Model]:
    def generator() -> nn.Module:
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(((16, 32), (32, 16), (16, 8))):
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2 if i else 1, 1 if i else 0, bias=False)]
            layers += [nn.BatchNorm2d(outer), nn.ReLU(True)]
        return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())

    def discriminator() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for inner, outer in ((8, 16), (16, 32)):
            layers += [nn.Conv2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        return nn.Sequential(*layers, nn.Conv2d(32, 1, 4), nn.Sigmoid())

    yield Model("torch", "DCGAN generator", generator, images(1, 16))
    yield Model("torch", "DCGAN discriminator", discriminator, images(32))


GROUPS = {
    "torch": plain_models,
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
    "segmentation_models_pytorch": segmentation_models,
    "ultralytics": ultralytics_models,
    "torch_geometric": geometric_models,
}


class Followers(TorchFunctionMode):
    """Counts, of an unconverted model, the normalisations that an activation follows, and the additions to one."""

    ACTIVATIONS = {
        F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_, F.relu6,
        F.hardtanh, F.elu, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.mish, F.softplus, torch.sigmoid,
        Tensor.sigmoid, Tensor.sigmoid_, torch.tanh, Tensor.tanh,
    }  # fmt: skip
    ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}

    def __init__(self) -> None:
        super().__init__()
        self.fusable = 0
        self.normalized: dict[int, Tensor] = {}  # keeps them alive, so that ids stay unique

    @contextmanager
    def of_frozen_layers(self, model: nn.Module) -> Iterator[None]:
        """Within the block, count what follows frozen layers too, which do not call batch_norm."""

        def mark(module: nn.Module, args: Any, output: Tensor) -> None:
            self.normalized[id(output)] = output

        frozen = [module for module in model.modules() if type(module).__name__.startswith("FrozenBatchNorm2d")]
        handles = [module.register_forward_hook(mark) for module in frozen]
        yield
        for handle in handles:
            handle.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        read = [a for a in args if isinstance(a, Tensor) and id(a) in self.normalized]
        if read and function in self.ACTIVATIONS:
            self.fusable += 1
        elif read and function in self.ADDITIONS:
            if all(isinstance(a, Tensor) and a.shape == read[0].shape for a in args[:2]):
                self.fusable += 1
        for tensor in read:
            if result is tensor and function not in self.ACTIVATIONS | self.ADDITIONS:
                continue
            if function is not F.batch_norm and getattr(function, "__name__", "") != "__get__":
                self.normalized.pop(id(tensor))
        if function is F.batch_norm:
            self.normalized[id(result)] = result
        return result


@contextmanager
def recorded(calls: Counter[str]) -> Iterator[None]:
    original = functional.batch_norm

    def spy(*args: Any, residual: Any = None, activation: Any = None, **kwargs: Any) -> Tensor:
        calls["+".join(["addition"] * (residual is not None) + ["activation"] * (activation is not None))] += 1
        return original(*args, residual=residual, activation=activation, **kwargs)

    functional.batch_norm = spy
    try:
        yield
    finally:
        functional.batch_norm = original


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict) or hasattr(output, "items"):
        output = [value for _, value in output.items()]
    return [tensor for item in output for tensor in tensors_of(item)] if isinstance(output, (list, tuple)) else []


def as_training(model: nn.Module) -> nn.Module:
    """Put a model into training mode, except what draws random numbers."""
    model.train()
    for module in model.modules():
        if "Drop" in type(module).__name__ or "Stochastic" in type(module).__name__:
            module.eval()
    return model


def results(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return outputs and gradients of a training step, each as one vector in float64."""
    model.zero_grad()
    outputs = tensors_of(as_training(model)(*inputs))
    sum((o * torch.linspace(-1, 1, o.numel()).to(o).view(o.shape)).mean() for o in outputs).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return tuple(torch.cat([t.detach().double().flatten() for t in ts]) for ts in (outputs, grads))  # type: ignore


def count(model: Model) -> Row:
    """Return the row of a model with its counts alone."""
    torch.manual_seed(0)
    stock, inputs = model.build(), model.inputs()
    row = Row(model)
    fast = fastbn.convert(copy.deepcopy(stock))
    report = fastbn.transforms.report(fast)
    row.layers = len(report.layers)
    row.left.update(layer.reason for layer in report.layers if layer.status == "left")
    row.left.update(f"{kind} calls batch_norm" for _, kind in report.calls)
    with torch.no_grad(), Followers() as followers, followers.of_frozen_layers(stock):
        stock.eval()(*inputs)
    row.fusable = followers.fusable
    with torch.no_grad(), recorded(row.fused):
        fast.eval()(*inputs)
    return row


def measure(model: Model, budget: Budget | None = None) -> Row:
    """Return the row of a model; a budget also times its training step."""
    row = count(model)
    torch.manual_seed(0)
    stock = model.build()
    fast, reference = fastbn.convert(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    errors: dict[str, list[tuple[float, ...]]] = {"stock": [], "fast": []}
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = model.inputs()
        expected = results(reference, tuple(a.double() if a.is_floating_point() else a for a in inputs))
        for name, module in (("stock", stock), ("fast", fast)):
            pairs = zip(results(module, inputs), expected, strict=True)
            errors[name].append(tuple(float((a - b).norm() / b.norm()) for a, b in pairs))
    for name, of_seeds in errors.items():
        row.errors[name] = tuple(statistics.median(values) for values in zip(*of_seeds, strict=True))  # type: ignore
    if budget is not None:
        row.speedup = speedup(model, budget)
    return row


def channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def speedup(model: Model, budget: Budget) -> float:
    """Return torch's time over fastbn's of forward and backward in training mode under autocast to bfloat16."""
    torch.manual_seed(0)
    stock = as_training(model.build())
    for parameter in stock.parameters():
        parameter.data = channels_last(parameter.data)
    inputs = tuple(channels_last(a) for a in model.inputs())

    def step(module: nn.Module) -> None:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = tensors_of(module(*inputs))
        sum(o.float().mean() for o in outputs).backward()  # type: ignore[union-attr]

    pair = [functools.partial(step, module) for module in (fastbn.convert(copy.deepcopy(stock)), stock)]
    return timer.speedup(*timer.time_in_turns(pair, timer.HostClock(), budget))


HEADER = """# What `fastbn.convert` makes of models

Each row is a model with random weights, before and after `fastbn.convert`. `python -m docs.models > docs/models.md` writes
this page.

| column | meaning |
|---|---|
| layers | normalisations in the model |
| left | of these, the ones that `convert` leaves as they are |
| fusable | calls of a layer, in evaluation, that an activation or an addition follows. Where two normalised tensors are added, one of the two counts |
| activation, addition, both | calls that are one operation with what follows: an activation, an addition, or an addition and an activation |
| alone | calls that are an operation of their own |
| output, gradient | the relative error of a training step in float32: the norm of the difference from the unconverted model in float64, over the norm of that. fastbn's error, and torch's in brackets; medians for three inputs. Large errors come from the ReLU: some input of it is just above 0 in float32, and just below in float64 |
| speed | torch's time over fastbn's for a training step: below 1 fastbn is slower. Most inputs are small, 4 images of 64 x 64, under autocast to bfloat16 and in channels_last. The median of pairs that take turns |

Measured on {machine}.

{columns}
|---|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501
COLUMNS = (
    *("package", "model", "layers", "left", "fusable", "activation", "addition", "both", "alone"),
    *("output (torch)", "gradient (torch)", "speed"),
)


def line(row: Row) -> str:
    fast, stock = row.errors["fast"], row.errors["stock"]
    counts = [row.fused[kind] for kind in ("activation", "addition", "addition+activation", "")]
    return columns(
        row.model.package,
        row.model.name,
        row.layers,
        sum(row.left.values()),
        row.fusable,
        *counts,
        *(f"{a:.1e} ({b:.1e})" for a, b in zip(fast, stock, strict=True)),
        f"{row.speedup:.2f}",
    )


def columns(*values: Any) -> str:
    return f"| {' | '.join(map(str, values))} |"


def selected(names: list[str]) -> Iterator[Model]:
    for package, models in GROUPS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its models are left out", file=sys.stderr)
            continue
        for model in models():
            if not names or model.name in names or package in names:
                yield model


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    described = machine(torch.device("cpu"))
    cpu = f"an {described['cpu']} with {described['instruction_set']}, threads: {described['threads']}"
    print(HEADER.format(machine=cpu, columns=columns(*COLUMNS)))
    rows = []
    for model in selected(names):
        try:
            rows.append(measure(model, BUDGET))
        except Exception as error:
            print(f"{model.package} {model.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(line(rows[-1]), flush=True)
    fused, fusable = sum(row.fused_calls for row in rows), sum(row.fusable for row in rows)
    print(f"\nOf {fusable} calls that an activation or an addition follows, {fused} are fused with it.")
    of_all = statistics.geometric_mean(row.speedup for row in rows)
    print(f"\nThe geometric mean of the speeds is {of_all:.2f}.")
    left = sum((row.left for row in rows), Counter())
    for reason, count in left.most_common():
        print(f"\n- {count}: {reason}")
    packages = {row.model.package: importlib.metadata.version(row.model.package.replace("_", "-")) for row in rows}
    print("\nVersions: " + ", ".join(f"{name} {version}" for name, version in packages.items()) + ".")


if __name__ == "__main__":
    main(sys.argv[1:])
