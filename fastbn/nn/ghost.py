"""GhostBatchNorm1d, 2d and 3d (Hoffer et al. 2017): each virtual batch, a part of the batch, has its own statistics.

Sample n of a batch belongs to virtual batch n % G. A contiguous (N, C, *) is then (N / G, G * C, *) in memory: a view,
whose channels are the pairs of virtual batch and channel, and the fused op normalises it in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbn import functional
from fastbn.nn import scripting
from fastbn.nn.batchnorm import FastBatchNorm
from fastbn.nn.running import set_running
from fastbn.nn.torch_activations import ActivationLike
from fastbn.ops.contract import HALF_TYPES
from fastbn.ops.dispatch import check_residual
from fastbn.ops.layout import suggest_memory_format


def group(x: Tensor, samples: int, groups: int) -> Tensor:
    """Return x (V * groups, C, *), V samples, as (V, groups * C, *): at [v, g * C + c] is [v * groups + g, c].

    It has the memory format of x, and is a view where x is contiguous. In channels_last, pixels lie between the samples
    and their channels, so there it is a copy, in rows of C elements.
    """
    if suggest_memory_format(x) is torch.contiguous_format:
        return x.unflatten(0, (samples, groups)).flatten(1, 2)
    # Channels go last first of all, so that the gradient is copied into that order too.
    return x.movedim(1, -1).unflatten(0, (samples, groups)).movedim(1, -2).flatten(-2).movedim(-1, 1)


def ungroup(y: Tensor, groups: int, channels: int, memory_format: torch.memory_format) -> Tensor:
    """Return the inverse of `group`, in the memory format that y has."""
    # The number of channels is an argument, since compilers do not simplify a quotient of symbolic sizes.
    if memory_format is torch.contiguous_format:
        return y.unflatten(1, (groups, channels)).flatten(0, 1)
    return y.movedim(1, -1).unflatten(-1, (groups, channels)).movedim(-2, 1).flatten(0, 1).movedim(-1, 1)


class _GhostBatchNorm(FastBatchNorm):
    """Common base of GhostBatchNorm1d, 2d and 3d: in evaluation a BatchNorm, with its parameters, buffers and state."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        virtual_batch_size: int,
        activation: ActivationLike = None,
        activation_param: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if type(virtual_batch_size) is not int or virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size: expected an int from 1 on, got {virtual_batch_size!r}")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            activation=activation,
            activation_param=activation_param,
        )
        self.virtual_batch_size = virtual_batch_size

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        groups, channels = input.shape[0] // self.virtual_batch_size, input.shape[1]
        if not self.training or groups < 2:
            return super()._normalize(input, residual, activation, activation_param)
        weight, bias, running_mean, running_var, counter = self._tensors(self.track_running_stats)
        vectors = weight, bias, running_mean, running_var
        if any(vector is not None and vector.numel() != channels for vector in vectors):
            return super()._normalize(input, residual, activation, activation_param)  # refuses it in torch's words
        if input.numel() == input.shape[0] * channels and self.virtual_batch_size == 1:
            raise ValueError(
                "GhostBatchNorm: expected more than one value per channel in a virtual batch, got "
                f"virtual_batch_size=1 and an input of shape {list(input.shape)}"
            )
        if residual is not None:
            check_residual(input, residual)
        # `larger` virtual batches have one sample more than the others, and come first.
        samples, larger = input.shape[0] // groups, input.shape[0] % groups
        parts = [(larger, samples + 1), (groups - larger, samples)] if larger else [(groups, samples)]
        sizes = [of_part * each for of_part, each in parts]
        inputs = input.split(sizes) if larger else (input,)
        residuals = residual.split(sizes) if larger and residual is not None else (residual,) * len(parts)
        memory_format = suggest_memory_format(input)
        outputs, steps = [], []
        for x, r, (count, each) in zip(inputs, residuals, parts, strict=True):
            # A step of each virtual batch's running statistics, of which the layer's are to be the mean.
            mean, var = None, None
            if running_mean is not None and running_var is not None:
                mean, var = (_per_group(vector, count, input.dtype) for vector in (running_mean, running_var))
            output = functional.batch_norm(
                group(x, each, count),
                mean,
                var,
                _repeated(weight, count, input.dtype),
                _repeated(bias, count, input.dtype),
                True,
                self.momentum,
                vars(self)["eps"],
                residual=None if r is None else group(r, each, count),
                activation=activation,
                activation_param=activation_param,
                # Both parts are of one batch, so only the last one counts.
                num_batches_tracked=counter if counter is None or x is inputs[-1] else counter.clone(),
            )
            outputs.append(ungroup(output, count, channels, memory_format))
            if mean is not None and var is not None:
                steps.append(torch.stack((mean, var)).unflatten(1, (count, channels)))
        if running_mean is not None and running_var is not None:
            moved = _mean_of_groups(steps, [each / input.shape[0] for _, each in parts])
            set_running(running_mean, moved[0])
            set_running(running_var, moved[1])
        return torch.cat(outputs) if larger else outputs[0]

    def __prepare_scriptable__(self) -> None:
        scripting.refuse(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


def _wide(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a vector, in float32 where it has the half type `dtype` of the input: sums over groups round once."""
    return vector.float() if vector.dtype == dtype and dtype in HALF_TYPES else vector


def _repeated(vector: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor | None:
    """Return [C] once per group, [groups * C], whose gradient is the sum over the groups."""
    return None if vector is None else _wide(vector, dtype).expand(groups, -1).reshape(-1)


def _per_group(vector: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return a copy of [C] per group, [groups * C], for an op to write to.

    It is no view of anything: where sizes are symbolic, Inductor fails on an op that writes to a view of a new tensor.
    """
    channels = torch.arange(groups * vector.shape[0], device=vector.device) % vector.shape[0]
    return _wide(vector, dtype).index_select(0, channels)


def _mean_of_groups(parts: list[Tensor], weights: list[float]) -> Tensor:
    """Return the mean over all groups of some [2, groups, C], each group by the weight of its part, float64 [2, C].

    It is taken about the first group, so that groups that agree give exactly what they hold. (That is selected, since
    Inductor takes a slice of 1 along a symbolic size for all of it.)
    """
    pivot = parts[0][:, 0].double()
    wide = pivot.unsqueeze(1)
    return sum(((part - wide).sum(1) * weight for part, weight in zip(parts, weights, strict=True)), pivot)


_DOC = """Ghost batch normalisation (Hoffer, Hubara and Soudry 2017, "Train longer, generalize better") of {shape}.

    In training a batch of N samples is G = max(1, N // virtual_batch_size) virtual batches, and each is normalised by
    its own mean and variance. Sample n belongs to virtual batch n % G where G divides N. Where it does not, N % G of
    them have one sample more; they are made of the first samples in the same way, the others of the rest. So each
    virtual batch has at least virtual_batch_size samples, unless the batch has fewer, and less than twice as many.

    virtual_batch_size: an int from 1 on, and from 2 on for (N, C). The other arguments but `save`, parameters, buffers,
    state_dict and evaluation are those of fastbn.{name}. A batch moves running statistics and counter once: by the mean
    over the virtual batches of their means and unbiased variances, each weighted by its samples. With G = 1 the layer
    is fastbn.{name}, bit for bit.

    forward(input, residual=None): as fastbn.{name}'s. Output and gradient have the input's memory format; a contiguous
    input is normalised where it lies, one in channels_last is copied, and so are residual, output and gradients.
    Raises what fastbn.{name} raises, and ValueError for virtual batches of one value per channel.
    """


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)")


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="(N, C, H, W)")


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)")


for _class in (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d):
    _class._epilogue_owner = _class
