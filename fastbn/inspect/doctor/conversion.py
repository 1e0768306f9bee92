"""What `fastbn.convert` would make of a model, and the memory traffic that this saves on a device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbn.inspect.doctor.observed import Seen
from fastbn.inspect.explain import explain
from fastbn.transforms.convert import convert
from fastbn.transforms.report import LayerReport, Report, report


@dataclass(frozen=True)
class Traffic:
    """The bytes that all calls of one kind move per pass: in torch's eager mode, and by the backend that serves them.

    Predicted from the tensors that each kernel has to read and write, not measured. operation: such as "BN + add +
    relu". calls: how many there are. backend: as `fastbn.explain` names it. torch_bytes, fastbn_bytes: of the forward,
    and in training of the backward too.
    """

    operation: str
    calls: int
    backend: str
    torch_bytes: float
    fastbn_bytes: float


@dataclass(frozen=True)
class Conversion:
    """What `fastbn.convert` would do. device: where the traffic is predicted. traffic: empty without an example input.

    report: as `fastbn.transforms.report` returns it of the converted model.
    """

    report: Report
    device: str
    traffic: tuple[Traffic, ...]

    @property
    def torch_bytes(self) -> float:
        return sum(row.torch_bytes for row in self.traffic)

    @property
    def fastbn_bytes(self) -> float:
        return sum(row.fastbn_bytes for row in self.traffic)


def predict(twin: nn.Module, seen: dict[str, list[Seen]], device: torch.device, gpu: str | None) -> Conversion:
    """Convert a copy of a model, and return what that makes of it.

    seen: the calls of its layers. device: where they run. gpu: a GPU to plan for instead, as `fastbn.explain` takes it.
    """
    is_training = twin.training
    made = report(convert(twin))
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for layer in made.layers:
        if layer.status == "left" or (device.type == "meta" and gpu is None):
            continue
        for call in seen.get(layer.path, ()):
            backend, before, after = _traffic_of(layer, call, is_training, device, gpu)
            row = sums[_operation(layer), backend]
            row[0], row[1], row[2] = row[0] + 1, row[1] + before, row[2] + after
    traffic = [Traffic(operation, int(n), backend, a, b) for (operation, backend), (n, a, b) in sums.items()]
    return Conversion(made, gpu or str(device), tuple(sorted(traffic, key=lambda row: -row.torch_bytes)))


def _operation(layer: LayerReport) -> str:
    return " + ".join(["BN", *["add"] * layer.add, *([layer.activation] if layer.activation else [])])


def _traffic_of(
    layer: LayerReport, call: Seen, is_training: bool, device: torch.device, gpu: str | None
) -> tuple[str, float, float]:
    """Return (backend, torch's bytes, the backend's bytes) of a call, with its backward in training."""
    input = torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device="meta" if gpu else device)
    options: dict[str, Any] = {"activation": layer.activation or None, "residual": layer.add, "training": call.by_batch}
    before = after = 0.0
    backend = ""
    for direction in ("forward", "backward") if is_training else ("forward",):
        stock = explain(input, direction, backend="torch", **options)
        plan = explain(input, direction, device=gpu, **options)
        before += (stock.tensor_reads + stock.tensor_writes) * call.shape.numel() * call.dtype.itemsize
        after += (plan.tensor_reads + plan.tensor_writes) * call.shape.numel() * call.dtype.itemsize
        backend = backend or plan.backend
    return backend, before, after
