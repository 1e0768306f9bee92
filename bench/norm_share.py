"""The fraction of a network's time that BatchNorm and what follows it take, by torch's profiler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# One pass may be disturbed, so passes are profiled until this time in seconds is over. Of a large network that is one.
SECONDS, MAX_PASSES = 0.1, 5
_FORWARD_OPS = {
    f"aten::{name}{in_place}" for name in ("relu", "clamp_min", "silu", "hardswish", "add") for in_place in ("", "_")
}
_BACKWARD_OPS = {"aten::threshold_backward", "aten::silu_backward", "aten::hardswish_backward"}


def norm_share(phases: Sequence[Callable[[], object]], device: torch.device) -> float | None:
    """Return the fraction of the profiled time of a pass in BatchNorm, activations, residual additions and their
    backward, or None where the profiler saw no time. It is the median of some passes, where they are short.

    It is counted by op, as `is_norm_op` says: device time of the kernels that an op launched or, on a CPU, the op's own
    time. The phases, forward and perhaps backward, are profiled one by one, since the name of an op does not tell a
    residual addition from a sum of gradients.
    """
    shares, begun = [], time.perf_counter()
    while len(shares) < MAX_PASSES and (not shares or time.perf_counter() - begun < SECONDS):
        profiles = [profiled(run, device) for run in phases]
        total = sum(each.total for each in profiles)
        if total <= 0:
            return None
        of_norms = (
            microseconds
            for number, each in enumerate(profiles)
            for op, microseconds in each.by_op.items()
            if is_norm_op(op, forward=number == 0)
        )
        shares.append(sum(of_norms) / total)
    return statistics.median(shares)


def is_norm_op(op: str, forward: bool) -> bool:
    """Return whether an op of the forward or backward pass is BatchNorm, an activation or a residual addition.

    In forward, an addition is a residual's or, in torch's BatchNorm, the count of batches. In backward, sums of
    gradients at a block's fork are autograd's, whoever computed them.
    """
    if op.startswith("fastbn::") or (op.startswith("aten::") and "batch_norm" in op):
        return True
    return op in (_FORWARD_OPS if forward else _BACKWARD_OPS)


@dataclass(frozen=True)
class Profile:
    """Microseconds of a profiled run: of each op, and in total, on a GPU with the kernels that no op launched."""

    by_op: dict[str, float]
    total: float


def profiled(run: Callable[[], object], device: torch.device) -> Profile:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        run()
    events = profiler.key_averages()
    ops = [event for event in events if event.device_type == DeviceType.CPU]
    if not on_gpu:
        by_op = {event.key: event.self_cpu_time_total for event in ops}
        return Profile(by_op, sum(by_op.values()))
    # The time of a kernel is in its own event and again in that of the op that launched it.
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    by_op = {event.key: event.self_device_time_total for event in ops}
    return Profile(by_op, sum(event.self_device_time_total for event in kernels))
