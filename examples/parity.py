"""Check BatchNorms of your own against float64 with fastbn's cases: torch's layer, and two kernels with a mistake each.

python -m pytest -p fastbn.testing.fixtures examples/parity.py -k torch     # passes
python -m pytest -p fastbn.testing.fixtures examples/parity.py -k one_sweep # fails where the mean is large
python -m pytest -p fastbn.testing.fixtures examples/parity.py -k biased    # fails in running_var
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbn.testing import parity_cases

images = pytest.mark.parametrize("bn_case", parity_cases("small", "bn2d"), ids=str)


class OneSweepBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that reads its input once, by var = E[x^2] - E[x]^2: what is left where E[x] is large is rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        mean = x.mean((0, 2, 3))
        var = (x * x).mean((0, 2, 3)) - mean * mean
        if self.training and self.running_mean is not None:
            self._move(mean.detach(), var.detach(), input.numel() // input.size(1))
        scale = (var.clamp(min=0) + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(input.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        if count == 0:
            return
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), momentum)


def biased_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps):
    """torch's batch_norm, but running_var moves to the biased variance: n / (n - 1) is forgotten."""
    if training and running_var is not None and input.numel() > 0:
        count = input.numel() // input.size(1)
        moved = running_var.clone()
        output = F.batch_norm(input, running_mean, moved, weight, bias, training, momentum, eps)
        unbiased = (moved - (1 - momentum) * running_var) / momentum
        running_var.lerp_(unbiased * (count - 1) / count, momentum)
        return output
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@images
def test_torch(bn_case, assert_bn_parity):
    assert_bn_parity(nn.BatchNorm2d, bn_case)


@images
def test_one_sweep(bn_case, assert_bn_parity):
    assert_bn_parity(OneSweepBatchNorm2d, bn_case)


@pytest.mark.parametrize("bn_case", parity_cases("small", "bn1d", "train", "float32"), ids=str)
def test_biased(bn_case, assert_bn_parity):
    assert_bn_parity(biased_batch_norm, bn_case)
