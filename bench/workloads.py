"""The cases that are timed: the activations of networks, shapes that are hard in some way, and sweeps of one size.

They are cases of fastbn/testing/cases.py, dense and with normal data.
"""

from __future__ import annotations

import torch

from fastbn.measure.operations import OPERATIONS, Operation
from fastbn.measure.workload import Workload
from fastbn.testing.cases import Case, make_case

# (C, H = W) of the inputs of ResNet-50's BatchNorms for images of 224 x 224.
RESNET50 = (
    (64, 112),
    (64, 56),
    (128, 56),
    (256, 56),
    (128, 28),
    (256, 28),
    (512, 28),
    (256, 14),
    (512, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
)
# Inputs of MobileNetV3-Large's: expansions that are not powers of two.
MOBILENETV3 = ((16, 112), (72, 56), (40, 28), (184, 14), (480, 14), (672, 7), (960, 7))
# Inputs of the four BatchNorms of LeNet on 28 x 28 images, after the channel.
LENET = ((6, 24, 24), (16, 8, 8), (120,), (84,))
_DECADES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


def suite(name: str) -> list[Workload]:
    """Return the workloads of a suite, the most informative first."""
    return list(dict.fromkeys(_SUITES[name]()))


def call_suite() -> list[Workload]:
    """Return layers for the costs of a call: one so small that the host's time shows, one whose memory matters."""
    operations = _named("train+relu", "train_backward+relu", "eval+relu")
    small = _cross(_in_layouts("small layer", (2, 64, 7, 7), (32, 128)), (torch.float32,), operations)
    memory = _named("train_backward+relu", "train_backward+add+relu")
    return [*small, *_cross(_in_layouts("block", (16, 64, 56, 56)), (torch.float32, torch.bfloat16), memory)]


def _quick() -> list[Workload]:
    cases = [
        *_in_layouts("resnet50", (16, 64, 56, 56), (16, 512, 7, 7)),
        *_in_layouts("few channels", (16, 3, 224, 224)),
        *_in_layouts("lenet", (256, 6, 24, 24))[:1],
        *_in_layouts("features", (4096, 512)),
    ]
    operations = _named("train", "train_backward", "train_backward+add+relu", "eval")
    return _cross(cases, (torch.float32, torch.bfloat16), operations)


def _cpu() -> list[Workload]:
    cases = [
        *_resnet50(16),
        *_in_layouts("few channels", (16, 3, 224, 224), (8, 1, 512, 512)),
        *_in_layouts("lenet", *[(256, *rest) for rest in LENET]),
        *_in_layouts("sequences", (64, 256, 128)),
        *_in_layouts("features", (4096, 512), (50000, 64)),
        *_in_layouts("video", (4, 32, 16, 56, 56)),
    ]
    compiled = _cross(_in_layouts("resnet50", (16, 64, 56, 56)), (torch.float32,), _STEPS, compiled=True)
    return [
        *compiled,
        *_without(compiled, _cross(cases, (torch.float32, torch.bfloat16), OPERATIONS)),
        *_sweeps(torch.float32, n=(16, 8, 8), c=(8, 8), hw=(8, 16)),
    ]


def _gpu() -> list[Workload]:
    headline = _in_layouts("resnet50", (128, 64, 56, 56), (128, 256, 14, 14), (128, 512, 7, 7))
    others = [
        *_in_layouts("few channels", (128, 3, 224, 224), (64, 1, 512, 512), (16, 8, 512, 512)),
        *_in_layouts("unet", (16, 64, 512, 512)),
        *_in_layouts("launch-bound", (2, 64, 7, 7), (8, 16, 14, 14), (32, 128)),
        *_in_layouts("mobilenetv3", *[(128, channels, size, size) for channels, size in MOBILENETV3]),
        *_in_layouts("video", (16, 32, 16, 56, 56)),
        *_in_layouts("sequences", (64, 256, 1024)),
        *_in_layouts("features", (4096, 512), (1000000, 64)),
    ]
    half, rest = (torch.bfloat16,), (torch.float32, torch.float16)
    compiled = _cross(headline, half, _named("train_backward", "train_backward+relu"), compiled=True)
    return [
        *_without(compiled, _cross(_resnet50(128), half, OPERATIONS)),
        *_cross(others, half, _STEPS),
        *_cross(_resnet50(128), rest, _STEPS),
        *compiled,
        *_cross([*_resnet50(256), *_resnet50(32)], half, _STEPS),
        *_sweeps(torch.bfloat16, n=(64, 14, 14), c=(32, 14), hw=(32, 64)),
        *_cross([*others, *_resnet50(256), *_resnet50(32)], (*half, *rest), OPERATIONS),
    ]


def _visit() -> list[Workload]:
    """Return twelve workloads that tell most about a GPU, with torch.compile: over 80 MB, 20 to 80 MB, 14 x 14, 7 x 7,
    channels_last, after an addition, and in float32."""
    large, middle, images14, images7 = (
        _in_layouts("resnet50", (128, channels, size, size))
        for channels, size in ((512, 28), (256, 28), (1024, 14), (2048, 7))
    )
    half, forward, backward = (torch.bfloat16,), _named("train"), _named("train_backward")
    added = _named("train_backward+add+relu")
    return [
        *_cross(large[:1], half, (*forward, *backward), compiled=True),
        *_cross(images14[:1], half, (*forward, *backward), compiled=True),
        *_cross(images14[1:], half, (*forward, *backward), compiled=True),
        *_cross(middle, half, backward, compiled=True),
        *_cross(images7[:1], half, backward, compiled=True),
        *_cross(images14, half, added, compiled=True),
        *_cross(middle[:1], (torch.float32,), backward, compiled=True),
    ]


_SUITES = {"cpu": _cpu, "gpu": _gpu, "quick": _quick, "visit": _visit}
SUITES = tuple(_SUITES)


def _named(*names: str) -> tuple[Operation, ...]:
    return tuple(operation for operation in OPERATIONS if str(operation) in names)


_STEPS = _named("train", "train_backward", "train_backward+relu", "train_backward+add+relu")


def _resnet50(batch: int) -> list[tuple[str, Case]]:
    return _in_layouts("resnet50", *[(batch, channels, size, size) for channels, size in RESNET50])


def _in_layouts(group: str, *shapes: tuple[int, ...]) -> list[tuple[str, Case]]:
    """Return (group, case) for each shape contiguous and, where it has spatial dimensions, channels_last."""
    kind = group.replace(" ", "_")
    cases = []
    for shape in shapes:
        layouts = {4: ("contiguous", "channels_last"), 5: ("contiguous", "channels_last_3d")}
        cases += [(group, make_case(kind, *shape, layout=at)) for at in layouts.get(len(shape), ("contiguous",))]
    return cases


def _sweeps(dtype: torch.dtype, n: tuple[int, int, int], c: tuple[int, int], hw: tuple[int, int]) -> list[Workload]:
    """Return cases that grow with N at (C, H, W) = n, with C at (N, H = W) = c, and with H*W at (N, C) = hw."""
    cases = [
        *_in_layouts("sweep N", *[(size, *n) for size in _DECADES]),
        *_in_layouts("sweep C", *[(c[0], size, c[1], c[1]) for size in _DECADES]),
        # One row of pixels, so that H*W takes exactly the swept value.
        *_in_layouts("sweep HW", *[(*hw, 1, size) for size in _DECADES]),
    ]
    return _cross(cases, (dtype,), _named("train_backward"))


def _cross(cases, dtypes, operations, compiled: bool = False) -> list[Workload]:
    # Operations are the innermost loop: those of one case and dtype share their inputs.
    return [
        Workload(group, case, dtype, operation, compiled)
        for dtype in dtypes
        for group, case in cases
        for operation in operations
    ]


def _without(known: list[Workload], workloads: list[Workload]) -> list[Workload]:
    seen = {str(workload) for workload in known}
    return [workload for workload in workloads if str(workload) not in seen]
