"""The update of running statistics by moments that were merged, selected or corrected, as batch normalisation's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.autograd.statistics import Moments


@torch.no_grad()
def move_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    moments: Moments,
) -> None:
    """Count a batch, and move the running statistics that there are by its moments, without a host sync.

    The variance is the unbiased one. momentum None: by 1 / num_batches_tracked, the cumulative average. The host need
    not know the number of elements: none leaves both statistics as they are, and one leaves the variance, of which it
    tells nothing.
    """
    mean, var, elements = moments
    factor: float | Tensor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        factor = 1 / num_batches_tracked.double() if momentum is None else factor
    unbiased = var * (elements / (elements - 1).clamp(min=1))
    for running, batch, least in ((running_mean, mean, 1), (running_var, unbiased, 2)):
        if running is not None:
            before = running.double()
            running.copy_(torch.where(elements >= least, before * (1 - factor) + batch * factor, before))
