"""fastbn.explain: which implementation a call would run, what it would launch and move, and why not a faster one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn import _C
from fastbn.backends import aten, native, registry
from fastbn.ops import dispatch
from fastbn.ops.activations import Name as ActivationName
from fastbn.ops.activations import check_param
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Backend, Call, Plan

_DIRECTIONS = ("forward", "backward")


def explain(
    input: Tensor,
    direction: str = "forward",
    *,
    activation: ActivationName | str | None = None,
    activation_param: float | None = None,
    residual: bool = False,
    training: bool = True,
    device: str | None = None,
    backend: str | None = None,
) -> Plan:
    """Return the plan for batch-normalising `input`, (N, C, *), on any device; a meta tensor is enough.

    activation, activation_param: as fastbn.functional.batch_norm takes them; the plan does not depend on the latter.
    direction: "forward" or "backward". training: batch statistics, else frozen ones. residual: whether one is added.
    device: "a100", "h100", "h200" or "b200" plans for that GPU, which need not be here; None for the input's device.
    backend: a name as fastbn.functional.batch_norm takes it; None for the backend that an eager call would get, which
    autograd records in training ("cuda" for a `device`).

    Raises ValueError for an argument outside these, and for a backend that cannot take the call.
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(_DIRECTIONS)}, got {direction!r}")
    recorded = training or direction == "backward"  # as in a network, whatever the input
    if recorded and input.is_floating_point() and not input.is_inference():
        input = input.detach().requires_grad_()
    limits = None if device is None else _C.named_device(device)
    index = activation_index(activation)
    call = Call(
        input,
        input if residual else None,
        None,
        None,
        *_statistics(input, training),
        None,
        0.1,
        1e-5,
        index,
        training,
        check_param(index, activation_param),
    )
    if limits is not None:
        reason = dispatch.why_torch_must_see(call) or dispatch.why_unsupported(call)
        if reason is None:
            return _planner(backend).plan(call, direction, f"planned for {device}", limits)
        return aten.TORCH.plan(call, direction, reason)
    chosen, reason = registry.choose(call, backend, ask_all=True)
    return chosen.plan(call, direction, reason or f"no backend is faster for {input.device.type} tensors")


def _planner(name: str | None) -> Backend:
    """Return the backend that plans for a GPU which need not be here."""
    backend = native.CUDA if name is None else registry.get(name)
    if "cuda" not in backend.device_types:
        raise ValueError(f"backend: expected one that plans for a device, got {name!r}")
    return backend


def _statistics(input: Tensor, training: bool) -> tuple[Tensor | None, Tensor | None]:
    if training:
        return None, None
    channels = input.size(1) if input.dim() > 1 else 0
    stats = torch.empty(channels, dtype=input.dtype, device=input.device)
    return stats, stats
