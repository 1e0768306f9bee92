"""The copy that everything is compared with: one tensor into another, for a range of sizes."""

from __future__ import annotations

import torch

from bench.results import CopyPoint
from bench.timer import Budget, Clock, summarize, time_in_turns

_LADDER = tuple(2**exponent for exponent in range(12, 31))
_LARGEST = {"cpu": 2**28, "cuda": 2**30}


def measure_copies(device: torch.device, clock: Clock, budget: Budget) -> list[CopyPoint]:
    """Time `dst.copy_(src)` for tensors from 4 KiB up. A copy reads each byte once and writes it once."""
    points = []
    for size in _LADDER:
        if size > _LARGEST[device.type]:
            break
        source = torch.ones(size // 4, dtype=torch.float32, device=device).normal_()
        target = torch.empty_like(source)
        (samples,) = time_in_turns([lambda: target.copy_(source)], clock, budget)
        median_us = summarize(samples).median_us
        points.append(CopyPoint(size, median_us, 2 * size / median_us / 1e3))
    return points
