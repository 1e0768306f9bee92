"""The update of running statistics outside of the fused ops, as batch normalisation's.

As the ops do, it leaves the versions of the buffers alone: autograd may have saved one in an evaluation before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.autograd.batch_norm import below_autograd
from fastbn.autograd.statistics import Moments


def set_running(running: Tensor, values: Tensor) -> None:
    """Set a buffer to some values, which are rounded to its dtype."""
    with torch.no_grad(), below_autograd():
        running.copy_(values)


def averaging_factor(num_batches_tracked: Tensor | None, momentum: float | None) -> float | Tensor:
    """Count a batch, and return its weight in the running statistics: `momentum`, or of the average of all batches."""
    if num_batches_tracked is None:
        return 0.0 if momentum is None else momentum
    with torch.no_grad(), below_autograd():
        num_batches_tracked.add_(1)
    return 1 / num_batches_tracked.double() if momentum is None else momentum


@torch.no_grad()
def move_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    moments: Moments,
) -> None:
    """Count a batch, and move the running statistics that there are by the batch's moments, without a host sync.

    The variance is the unbiased one. The host need not know the number of elements: none leaves both statistics as they
    are, and one leaves the variance, of which it tells nothing.
    """
    mean, var, elements = moments
    factor = averaging_factor(num_batches_tracked, momentum)
    unbiased = var * (elements / (elements - 1).clamp(min=1))
    for running, batch, least in ((running_mean, mean, 1), (running_var, unbiased, 2)):
        if running is not None:
            before = running.double()
            set_running(running, torch.where(elements >= least, before * (1 - factor) + batch * factor, before))
