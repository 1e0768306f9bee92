"""SyncBatchNorm: batch normalisation by the statistics of all processes of a group.

    n = sum n_i,   mean = sum n_i / n * mean_i,   var = sum n_i / n * (var_i + (mean_i - mean)^2)

over the ranks i (Chan, Golub and LeVeque 1979, for any number of parts), in float64 and in the order of the ranks, so
that all of them get the same bits. Forward has one collective, which gathers 2C + 1 numbers of each rank, and backward
another, which adds up 2C. Raw sums of squares would need no gathering, but cancel where |mean| >> std. Large groups add
up all the same: the means in one collective, and then the squares about the mean in another.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from fastbn import _torch
from fastbn.autograd.moments import merge_stacked
from fastbn.autograd.statistics import Hooks, Moments, normalize
from fastbn.nn.batchnorm import FastBatchNorm, signature
from fastbn.nn.running import move_running_stats

# Larger groups add up. An estimate: a gather by a ring takes a time that grows with the ranks, sums by a tree one that
# grows with their logarithm, and bench/sync_model.py predicts that the two meet between 32 and 64 GPUs.
MAX_GATHERED_RANKS = 32


class Group(NamedTuple):
    """A process group by its name, with the number of its processes and the rank of this one."""

    name: str
    size: int
    rank: int


class Gather(torch.autograd.Function):
    """The vectors of all ranks as [size, length], differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _torch.all_gather(vector, group.size, group.name).view(group.size, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce(grad.contiguous(), ctx.group)[ctx.group.rank], None


class Reduce(torch.autograd.Function):
    """The sum of the tensors of all ranks, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _torch.all_reduce(tensor, group.name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce(grad.contiguous(), ctx.group), None


def gather(vector: Tensor, group: Group) -> Tensor:
    """Return the vectors of all ranks, [size, length]."""
    if torch.is_grad_enabled():
        apply: Any = Gather.apply
        return apply(vector, group)
    return _torch.all_gather(vector, group.size, group.name).view(group.size, -1)


def reduce(tensor: Tensor, group: Group) -> Tensor:
    """Return the sum of the tensors of all ranks."""
    if torch.is_grad_enabled():
        apply: Any = Reduce.apply
        return apply(tensor, group)
    return _torch.all_reduce(tensor, group.name)


def merged(gathered: Tensor) -> Moments:
    """Return the moments of all ranks from [ranks, 2C + 1]: mean, biased variance and number of elements of each."""
    channels = gathered.shape[1] // 2
    return merge_stacked(Moments(*gathered.split((channels, channels, 1), dim=1)))


class Synchronize(Hooks):
    """Moments and sums of all ranks of a group."""

    needs_ops = merges = True

    def __init__(self, group: Group) -> None:
        self.group = group

    def merge(self, moments: Moments) -> Moments:
        if self.group.size <= MAX_GATHERED_RANKS:
            return merged(gather(torch.cat(moments), self.group))
        mean, var, count = moments
        sums = reduce(torch.cat((mean * count, count)), self.group)
        total = sums[-1:]
        mean_of_all = sums[:-1] / total.clamp(min=1)
        squares = var + (mean - mean_of_all).square()
        return Moments(mean_of_all, reduce(squares * (count / total.clamp(min=1)), self.group), total)

    def merge_sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        sums = reduce(torch.cat((sum_grad, sum_grad_xhat)), self.group)
        return sums[: len(sum_grad)], sums[len(sum_grad) :]


class SyncBatchNorm(FastBatchNorm):
    """torch.nn.SyncBatchNorm with fused kernels, one collective per direction, no host sync, and on CPUs too.

    In groups of more than 32 processes forward has two collectives, whose size does not grow with the group.

    Arguments, parameters, buffers and state_dict are those of the installed torch.nn.SyncBatchNorm, and activation,
    activation_param and save those of fastbn.BatchNorm2d; while statistics are synchronised the input is kept for
    backward, whatever `save` is. process_group: the processes that share statistics; None for all. It is no subclass of
    torch's, since DistributedDataParallel refuses those on a CPU.

    forward(input, residual=None): input (N, C, *) of at least 2 dimensions; residual has the shape, dtype and device of
    input and is added before the activation. N may differ between ranks, and be 0. In training mode, in a group of more
    than one process, the statistics are those of all of them, and running_var gets the variance that is unbiased over
    all of them. Otherwise the layer is fastbn.BatchNorm2d, bit for bit.

    Every rank of the group has to call the layers in the same order. A rank meets the others in each forward and in
    each backward that reaches the layer, whichever gradients it needs: another rank may need more. The gradients of
    weight and bias are the sums over this rank, which DistributedDataParallel averages. A backward that is itself to be
    differentiated has two collectives, on all ranks or none.

    Raises ValueError for an input of other dimensions, without channels, or of one value per channel where no other
    process could have more; for what the ops cannot take; and for torch.func, forward-mode AD and export, which would
    have to look through the collectives. One value per channel over all ranks is not an error, since that is known only
    on the device: it gives the bias, and moves running_mean but not running_var, which would have no value to move to.
    If another rank is gone, raises torch.distributed's error, after the group's timeout at the latest, and no buffer
    has moved.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **options
        )
        self.process_group = process_group

    _check_input_dim: Any = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = nn.SyncBatchNorm._check_non_zero_input_channels

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = self._group() if self.training else None
        if group is None:
            return super()._normalize(input, residual, activation, activation_param)
        call = self._call_by_batch(input, residual, activation, activation_param)
        output, moments = normalize(call, Synchronize(group))
        move_running_stats(call.running_mean, call.running_var, call.num_batches_tracked, call.momentum, moments)
        return output

    def _group(self) -> Group | None:
        """Return the group that shares statistics, or None where this process is alone, or not in the group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group: Any = distributed.group.WORLD if self.process_group is None else self.process_group
        size = distributed.get_world_size(group)  # -1 where this process is not in it
        return Group(group.group_name, size, distributed.get_rank(group)) if size > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """Return a copy with the same process group, which is no part of the layer and cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        copied: Any = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def __prepare_scriptable__(self) -> None:
        raise TypeError(
            "torch.jit.script: expected layers with a form in TorchScript, got SyncBatchNorm, whose collectives have "
            "none; fastbn.revert gives it a plain layer's class"
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Return `module` with its BatchNorms replaced as torch.nn.SyncBatchNorm does it, but by fastbn's layers.

        `fastbn.convert(module, sync=True)` keeps the layers, and changes their classes only.
        """
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        target: Any = cls
        for layer in converted.modules():
            if type(layer) is nn.SyncBatchNorm:
                layer.__class__ = target
        return converted


SyncBatchNorm._epilogue_owner = SyncBatchNorm
SyncBatchNorm.__init__.__signature__ = signature(nn.SyncBatchNorm)  # type: ignore[attr-defined]
