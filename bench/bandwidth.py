"""The copy that everything is compared with: one tensor into another, for a range of sizes."""

from __future__ import annotations

import torch

from bench.results import CopyPoint
from fastbn.measure.copies import time_copy
from fastbn.measure.timer import Budget, Clock

_LADDER = tuple(2**exponent for exponent in range(12, 31))
_LARGEST = {"cpu": 2**28, "cuda": 2**30}


def measure_copies(device: torch.device, clock: Clock, budget: Budget) -> list[CopyPoint]:
    """Time `dst.copy_(src)` for tensors from 4 KiB up. A copy reads each byte once and writes it once."""
    points = []
    for size in _LADDER:
        if size > _LARGEST[device.type]:
            break
        median_us = time_copy(size, device, clock, budget)
        points.append(CopyPoint(size, median_us, 2 * size / median_us / 1e3))
    return points
