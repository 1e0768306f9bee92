"""fastbn.explain: which implementation a call would run, what it would launch and move, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbn import _C
from fastbn.backends import registry
from fastbn.ops import dispatch
from fastbn.ops.activations import index as activation_index
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.contract import DTYPES
from fastbn.ops.layout import runs_of, suggest_memory_format

_DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Plan:
    """How one call runs. Traffic is predicted, not measured, in units of S, the bytes of one activation tensor."""

    backend: str
    kernel: str
    launches: int
    tensor_reads: float
    tensor_writes: float
    cluster: int
    blocks: int
    threads: int
    shared_bytes: int
    reason: str

    def __str__(self) -> str:
        parts = [f"{self.backend}: {self.kernel}"]
        if self.launches:
            parts.append(f"{self.launches} launch{'es' if self.launches > 1 else ''}")
        if self.threads:
            parts.append(f"{self.blocks} blocks of " * (self.blocks > 0) + f"{self.threads} threads")
        if self.cluster > 1:
            parts[-1] += f" in clusters of {self.cluster}"
        traffic = f"reads {self.tensor_reads:g} S, writes {self.tensor_writes:g} S"
        return "; ".join([", ".join(parts), traffic, self.reason])


def explain(
    input: Tensor,
    direction: str = "forward",
    *,
    activation: str | None = None,
    residual: bool = False,
    training: bool = True,
    device: str | None = None,
) -> Plan:
    """The plan for batch-normalising `input`, a tensor (N, C, *) on any device; meta tensors do.

    direction: "forward" or "backward". training: batch statistics, else frozen ones. residual: whether one is added.
    device: "a100", "h100", "h200" or "b200" asks about that GPU without having one; None about the input's own device.

    Raises ValueError for an argument outside these.
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(_DIRECTIONS)}, got {direction!r}")
    index = activation_index(activation)
    limits = None if device is None else _C.named_device(device)
    reason = dispatch.why_torch_must_see(input) or dispatch.why_unsupported(
        input, *_statistics(input, training), None, None, None, training, momentum=0.1, eps=1e-5
    )
    if reason is not None:
        backend = None
    elif device is not None:
        backend, reason = "cuda", f"planned for {device}"
    else:
        backend, reason = registry.default_backend(input.device)
    if backend == "cuda":
        return _cuda_plan(input, direction, index, residual, training, limits, reason)
    if backend == "cpu":
        kernel = "row_blocks" if _is_channels_innermost(input) else "channel_blocks"
        reads, writes = _two_pass_traffic(input, direction, index, residual, training)
        return Plan("cpu", kernel, 1, reads, writes, 1, 0, torch.get_num_threads(), 0, reason)
    reads, writes = _torch_traffic(direction, index, residual, training)
    return Plan("torch", "batch_norm", 0, reads, writes, 1, 0, 0, 0, reason)


def _statistics(input: Tensor, training: bool):
    if training:
        return None, None
    channels = input.size(1) if input.dim() > 1 else 0
    stats = torch.empty(channels, dtype=input.dtype, device=input.device)
    return stats, stats


def _is_channels_innermost(input: Tensor) -> bool:
    return runs_of(tuple(input.shape), suggest_memory_format(input))[0]


def _two_pass_traffic(input, direction, index, residual, training) -> tuple[float, float]:
    masked = residual and is_piecewise_linear(index)
    mask = 1 / (8 * input.element_size()) if masked else 0.0
    if direction == "forward":
        return (2.0 if training else 1.0) + residual, 1.0 + mask
    derivative = 0.0 if index == 0 else mask if masked else float(residual)
    writes = 1.0 + (residual and index != 0)
    if training:
        return 2 * (2 + derivative), writes
    return (1.0 if index == 0 else 1 + mask if masked else 2.0 + residual), writes


def _torch_traffic(direction, index, residual, training) -> tuple[float, float]:
    """Batch norm, addition and activation each read and write the whole tensor."""
    if direction == "forward":
        return (2.0 if training else 1.0) + 2 * residual + (index != 0), 1.0 + residual + (index != 0)
    return (4.0 if training else 2.0) + 2 * (index != 0), 1.0 + (index != 0)


def _cuda_plan(input, direction, index, residual, training, limits, reason) -> Plan:
    if limits is None:
        limits = _C.device_limits(input.device.index)
    wanted = {("forward", True): "forward", ("forward", False): "eval", ("backward", True): "backward"}
    plan = _C.plan(
        sizes=list(input.shape),
        strides=list(input.stride()),
        dtype=DTYPES.index(input.dtype),
        direction=wanted.get((direction, training), "frozen_backward"),
        activation=index,
        residual=residual,
        aligned=input.device.type == "meta" or input.data_ptr() % 16 == 0,
        limits=limits,
    )
    kept = plan.pop("kept")
    plan.pop("slice_channels")
    if kept < 1:
        reason += f"; keeps {kept:.0%} of a slice on chip and reads the rest again, from L2 as far as that holds it"
    if not plan.pop("vectorized"):
        reason += "; element by element, because neither runs nor rows are whole octets of aligned elements"
    return Plan(backend="cuda", reason=reason, **plan)
