"""The networks that are timed, with a small and a usual size of batch each, and the suites of them.

ResNet, MobileNetV3, EfficientNet and DenseNet are torchvision's where it is installed; timm needs torchvision, so it is
not tried. Without it the ResNets are those of bench/architectures.py, as the other networks always are, and the rest
are left out.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench import architectures
from bench.results import case_name
from fastbn.measure.workload import dtype_name

TRAIN, EVAL = "train_backward", "eval"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)
SMALL, USUAL = "small", "usual"
OWN_SOURCE = "bench/architectures.py"
# A GPU's usual batch over a CPU's, whose time is short.
GPU_BATCHES = 16
EDGES_PER_NODE = 4


@dataclass(frozen=True)
class Network:
    """A network. `small` and `usual` are shapes of its input, for someone who tries out or trains on little images, and
    for the size that the network is known for; batches are a CPU's.

    own: makes it from bench/architectures.py, or None. torchvision: its name there, or None, and options that leave out
    what draws random numbers.
    """

    small: tuple[int, ...]
    usual: tuple[int, ...]
    own: Callable[[], nn.Module] | None = None
    torchvision: str | None = None
    options: dict[str, float] = field(default_factory=dict)
    has_edges: bool = False

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(FORMATS) if len(self.small) == 4 else ("contiguous",)


NETWORKS = {
    "resnet50": Network((4, 3, 64, 64), (2, 3, 224, 224), architectures.resnet50, "resnet50"),
    "resnet18": Network((4, 3, 64, 64), (4, 3, 224, 224), architectures.resnet18, "resnet18"),
    "mobilenet_v3_small": Network(
        (4, 3, 64, 64), (4, 3, 224, 224), torchvision="mobilenet_v3_small", options={"dropout": 0.0}
    ),
    "efficientnet_b0": Network(
        (4, 3, 64, 64),
        (4, 3, 224, 224),
        torchvision="efficientnet_b0",
        options={"dropout": 0.0, "stochastic_depth_prob": 0.0},
    ),
    "densenet121": Network((4, 3, 64, 64), (2, 3, 224, 224), torchvision="densenet121"),
    "yolo": Network((4, 3, 64, 64), (2, 3, 320, 320), architectures.YOLO),
    "unet": Network((4, 3, 64, 64), (2, 3, 160, 160), architectures.UNet),
    "gin": Network((100, 32), (3200, 32), architectures.GIN, has_edges=True),
    "mlp": Network((64, 32), (1024, 32), architectures.mlp),
    "pointnet": Network((8, 3, 128), (8, 3, 1024), architectures.PointNet),
}


@dataclass(frozen=True)
class NetworkCase:
    """A pass of a network over a batch. `dtype` is float32, or bfloat16 for autocast with float32 parameters.

    op: TRAIN for forward, loss and backward in training mode, EVAL for forward in evaluation mode without gradients.
    group: SMALL or USUAL.
    """

    network: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    layout: str = "channels_last"
    op: str = TRAIN
    group: str = USUAL

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"expected a network of {tuple(NETWORKS)}, got {self.network!r}")
        known = NETWORKS[self.network]
        if len(self.shape) != len(known.small):
            raise ValueError(f"expected a shape of {len(known.small)} sizes for {self.network}, got {self.shape}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype of {DTYPES}, got {self.dtype}")
        if self.layout not in known.layouts:
            raise ValueError(f"expected a layout of {known.layouts} for {self.network}, got {self.layout!r}")
        if self.op not in (TRAIN, EVAL):
            raise ValueError(f"expected an op of {(TRAIN, EVAL)}, got {self.op!r}")

    @property
    def name(self) -> str:
        return case_name(self.network, self.shape, self.layout)

    def __str__(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)} {self.op}"


def suite(name: str, device: torch.device) -> list[NetworkCase]:
    """Return the cases of networks that a suite has, network by network."""
    step = functools.partial(NetworkCase, "resnet50")
    return {
        "quick": lambda: [step((4, 3, 64, 64), group=SMALL)],
        "cpu": lambda: [step((batch, 3, 224, 224)) for batch in (4, 8)],
        "gpu": lambda: [step((batch, 3, 224, 224)) for batch in (32, 128, 256)],
        "visit": list,
        "networks": lambda: list(_all(GPU_BATCHES if device.type == "cuda" else 1)),
    }[name]()


def _all(batches: int) -> Iterator[NetworkCase]:
    for name, network in NETWORKS.items():
        shapes = {SMALL: network.small, USUAL: (batches * network.usual[0], *network.usual[1:])}
        for group, shape in shapes.items():
            for layout in network.layouts:
                for dtype in DTYPES:
                    for op in (TRAIN, EVAL):
                        yield NetworkCase(name, shape, dtype, layout, op, group)


def why_absent(network: str) -> str | None:
    """Return why a network cannot be built here, or None."""
    package, reason = _torchvision()
    return f"{network} is torchvision's, and {reason}" if package is None and NETWORKS[network].own is None else None


def build(network: str) -> tuple[nn.Module, str]:
    """Return a new model with random weights and where its definition is from."""
    known = NETWORKS[network]
    package, reason = _torchvision()
    if known.torchvision is not None and package is not None:
        model = getattr(package.models, known.torchvision)(**known.options)
        return model, f"torchvision {package.__version__}"
    if known.own is None:
        raise RuntimeError(f"expected torchvision for {network}: {reason}")
    return known.own(), OWN_SOURCE


def make_input(
    network: str, shape: tuple[int, ...], layout: str, device: torch.device, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return random arguments of a network's forward: an input of `shape`, and for a graph its edges."""
    generator = torch.Generator(device).manual_seed(seed)
    input = torch.randn(shape, generator=generator, device=device).to(memory_format=FORMATS[layout])
    if not NETWORKS[network].has_edges:
        return (input,)
    # From any node of a graph to any other.
    size, count = architectures.NODES_PER_GRAPH, EDGES_PER_NODE * shape[0]
    ends = torch.randint(size, (2, count), generator=generator, device=device)
    first = size * torch.randint(shape[0] // size, (count,), generator=generator, device=device)
    return input, ends + first


def _torchvision() -> tuple[types.ModuleType | None, str]:
    """Return torchvision, or None and the reason."""
    try:
        import torchvision
    except Exception as error:  # that of another torch than this fails by other errors than ImportError
        return None, f"it cannot be imported: {error}".splitlines()[0]
    return torchvision, ""
