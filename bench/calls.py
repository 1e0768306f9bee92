"""The costs of a call beside its device time: host time, kernel launches, and memory.

Host time is measured from call to return with an empty queue, on a layer so small that a CPU too spends the time on the
way to the kernel, not in it. Launches and allocations are counted by torch's profiler.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastbn.measure.implementations import Prepared
from fastbn.measure.timer import Call


def count_launches(call: Call, device: torch.device) -> tuple[int | None, list[str]]:
    """Return (kernels that one call runs on the GPU, their names in order); copies and fills count. None on a CPU."""
    if device.type != "cuda":
        return None, []
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    # Annotations are ranges that a tracer marked, not work.
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = [event for event in on_gpu if not event.is_user_annotation]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    return len(names), names


def held_bytes(prepared: Prepared, input: Tensor) -> int | None:
    """Return the bytes that a forward call keeps for its backward beyond the input and the parameters: its output and
    what it saves.

    None where a tensor's layout hides its size, as oneDNN's does.
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(prepared.forward())
    if any(tensor.is_mkldnn for tensor in saved):
        return None
    known = {tensor.untyped_storage().data_ptr() for tensor in (input, *prepared.module.parameters())}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the maximum that a call allocates at once beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # Only the raw events tell single allocations: those of ops hold sums.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)
