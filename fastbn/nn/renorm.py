"""BatchRenorm1d, 2d and 3d (Ioffe 2017): training normalises nearly as evaluation will, also in small batches.

    y = ((x - mean) * inv_std * r + d) * weight + bias
    r = std / running_std in [1 / r_max, r_max],   d = (mean - running_mean) / running_std in [-d_max, d_max]

r and d are constants in backward. Without their bounds y is what evaluation computes, and with r_max = 1 and d_max = 0
it is batch normalisation's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fastbn.autograd.statistics import Hooks, Moments, normalize
from fastbn.nn import scripting
from fastbn.nn.batchnorm import FastBatchNorm, leaf_of_symbolic_tracing
from fastbn.nn.running import move_running_stats
from fastbn.nn.torch_activations import ActivationLike

Schedule: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ramp:
    """A schedule for `r_max` or `d_max`: `low` up to batch `begin`, then linear to `high` at batch `end`, then `high`.

    The paper trains ImageNet with `r_max=Ramp(5000, 40000, 1.0, 3.0)` and `d_max=Ramp(5000, 25000, 0.0, 5.0)`.
    """

    begin: int
    end: int
    low: float
    high: float

    def __call__(self, batches: Tensor) -> Tensor:
        """Return the bound for the batch that makes the counter `batches`, float64, of no dimensions."""
        progress = (batches - self.begin) / max(self.end - self.begin, 1)
        return self.low + (self.high - self.low) * progress.clamp(0, 1)


class _Renormalize(Hooks):
    """The correction by running statistics as they are before the batch."""

    def __init__(self, running_mean: Tensor, running_var: Tensor, eps: float, bounds: tuple[Any, ...]) -> None:
        self.running_mean, self.running_var, self.eps, self.bounds = running_mean, running_var, eps, bounds

    def correct(self, moments: Moments) -> tuple[Tensor, Tensor]:
        r_max, d_max = self.bounds
        running_std = (self.running_var.double() + self.eps).sqrt()
        r = (moments.var + self.eps).sqrt() / running_std
        d = (moments.mean - self.running_mean.double()) / running_std
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)


class _BatchRenorm(FastBatchNorm):
    """Common base of BatchRenorm1d, 2d and 3d: in evaluation a BatchNorm, with its parameters, buffers and state."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        r_max: float | Schedule = 3.0,
        d_max: float | Schedule = 5.0,
        activation: ActivationLike = None,
        activation_param: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, bound, smallest in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            if not callable(bound) and not bound >= smallest:
                raise ValueError(f"{name}: expected a number from {smallest} on, or a schedule, got {bound}")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            device=device,
            dtype=dtype,
            activation=activation,
            activation_param=activation_param,
        )
        self.r_max, self.d_max = r_max, d_max

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(input, residual)
        if isinstance(input, fx.Proxy):
            return leaf_of_symbolic_tracing(self, input, residual)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or counter is None:
            raise ValueError("BatchRenorm: expected running_mean, running_var and num_batches_tracked, got None")
        call = self._call_by_batch(input, residual, self.activation, self.activation_param)._replace(
            running_mean=mean, running_var=var, num_batches_tracked=counter
        )
        batches = counter.double() + 1
        bounds = tuple(bound(batches) if callable(bound) else bound for bound in (self.r_max, self.d_max))
        output, moments = normalize(call, _Renormalize(mean, var, call.eps, bounds))
        move_running_stats(mean, var, counter, self.momentum, moments)
        return output

    def __prepare_scriptable__(self) -> None:
        scripting.refuse(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


_DOC = """Batch renormalisation (Ioffe 2017) of {shape}.

    Training corrects the normalised value by clipped r and d, so that it depends less on the batch; evaluation,
    parameters, buffers and state_dict are those of torch.nn.{name}. r_max, d_max: numbers, or schedules that get the
    number of batches including this one (float64, no dimensions, on the layer's device) and return a tensor: `Ramp`, or
    any function. num_batches_tracked, a part of the state, is that number, so a run that is resumed goes on with its
    schedule. The other arguments are those of fastbn.{name}; running statistics are always tracked.

    forward(input, residual=None): residual has the shape, dtype and device of input and is added before the activation.
    Raises ValueError for an input of other dimensions, for one value per channel, and for what the ops cannot take.
    """


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)")


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="(N, C, H, W)")


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)")
