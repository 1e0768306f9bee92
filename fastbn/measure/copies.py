"""The copy that everything is compared with: one tensor into another of the same size."""

from __future__ import annotations

import torch

from fastbn.measure.timer import Budget, Clock, summarize, time_in_turns


def time_copy(size: int, device: torch.device, clock: Clock, budget: Budget) -> float:
    """Return the median microseconds of `dst.copy_(src)` of `size` bytes: each byte is read once and written once."""
    source = torch.ones(max(1, size // 4), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    (samples,) = time_in_turns([lambda: target.copy_(source)], clock, budget)
    return summarize(samples).median_us
