"""AccumulatedBatchNorm1d, 2d and 3d: one batch that a training step sees in several forwards, its micro-batches.

A forward normalises by the moments of all elements since the step began, merged by Chan's formula, and the running
statistics move once, when the step ends. The backward of micro-batch k is

    grad_input = (grad_z - mean_k(grad_z) - xhat_k * mean_k(grad_z * xhat_k)) * weight * inv_std

with means over k and xhat_k normalised by the moments of k alone: the gradient loses what is along the channel's mean
and scale, as the whole batch's does, but by the elements of k. inv_std is that of the forward. (The derivative by the
part that k has in the merged moments would keep most of what is along the two, and is further from the whole batch's.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbn import _torch
from fastbn.autograd.moments import merge_stats
from fastbn.autograd.statistics import Hooks, Moments, normalize
from fastbn.nn import scripting
from fastbn.nn.batchnorm import FastBatchNorm
from fastbn.nn.running import move_running_stats


class _MicroBatch(Hooks):
    """Moments merged with those of the micro-batches before, and sums of the whole batch estimated from this one's.

    elements: how many per channel this micro-batch has.
    """

    needs_ops = True

    def __init__(self, before: Moments | None, elements: int, eps: float) -> None:
        self.before, self.elements, self.eps = before, elements, eps

    def merge(self, moments: Moments) -> Moments:
        if self.before is None:
            return moments
        merged = merge_stats(self.before, moments)
        inv_std = (merged.var + self.eps).rsqrt()
        # Mean and variance of this micro-batch's elements as they are normalised.
        self.own = (moments.mean - merged.mean) * inv_std, (moments.var + self.eps) * inv_std.square()
        return merged

    def merge_sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums which, divided by all elements, are the line through grad_z over xhat, fitted to this part."""
        if self.before is None:
            return sum_grad, sum_grad_xhat
        mean, var = self.own
        slope = (sum_grad_xhat - sum_grad * mean) / var
        ratio = self.before.elements / max(self.elements, 1) + 1
        return (sum_grad - slope * mean) * ratio, slope * ratio


class _AccumulatedBatchNorm(FastBatchNorm):
    """Common base of AccumulatedBatchNorm1d, 2d and 3d. Outside of its training mode it is a BatchNorm.

    moments: those of all forwards in training mode since the step began, None before the first. No buffer, so it is in
    no state_dict; a class attribute until then, so that another layer can be given this class.
    """

    moments: Moments | None = None

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Tensor:
        if not self.training:
            return super()._normalize(input, residual, activation, activation_param)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not torch.compiler.is_compiling() and _torch.is_in_backward():
            raise RuntimeError(
                "AccumulatedBatchNorm: expected no forward within a backward, as activation checkpointing runs it: its "
                "micro-batch would count twice"
            )
        call = self._call_by_batch(input, residual, activation, activation_param)
        hooks = _MicroBatch(self.moments, input.numel() // max(input.shape[1], 1), call.eps)
        output, moments = normalize(call, hooks)
        self.moments = moments
        return output

    def finish(self) -> None:
        """End the step: move the running statistics, once, by the moments of all its forwards, and forget these.

        With the unbiased variance over all elements and by `momentum`, as BatchNorm moves them after one forward of the
        whole batch; `num_batches_tracked` grows by 1. Without a forward since the last step nothing moves.
        """
        moments, mean, var, counter = self.moments, self.running_mean, self.running_var, self.num_batches_tracked
        self.discard()
        if moments is None or mean is None or var is None or not self.track_running_stats:
            return
        move_running_stats(mean, var, counter, self.momentum, moments)

    def discard(self) -> None:
        """End the step without moving anything: what it has seen is forgotten."""
        vars(self).pop("moments", None)

    def __prepare_scriptable__(self) -> None:
        scripting.refuse(self)


_DOC = """torch.nn.{name} for gradient accumulation: several forwards in training mode are one batch, until `finish`.

    Arguments, parameters, buffers and state_dict are those of fastbn.{name}, except for `save`, which is ignored in
    training. `fastbn.accumulate` makes layers of this class of a model's BatchNorms for one step; a model may also be
    built with them.

    layer(micro_batch) normalises by the moments of all micro-batches since the step began, this one included, and moves
    no buffer. layer.finish() ends the step, and moves the running statistics once; layer.discard() ends it and moves
    nothing. layer.moments: what has been merged so far (fastbn.functional.Moments), None at the beginning.

    Exact are the running statistics, those of all elements that the layer has seen in the step, and the moments that
    normalise the last micro-batch. Earlier ones are normalised by fewer elements, and what the backward of a batch
    takes out of the gradient is estimated from each micro-batch alone: docs/variants.md has measurements. Several calls
    in one forward are parts of one batch too.

    forward(input, residual=None): {shape}; residual has the shape, dtype and device of input and is added before the
    activation. Raises ValueError for an input of other dimensions, for one value per channel, and for what the ops
    cannot take, and RuntimeError within a backward (activation checkpointing). No second derivative in training.
    """


class AccumulatedBatchNorm1d(_AccumulatedBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="input (N, C) or (N, C, L)")


class AccumulatedBatchNorm2d(_AccumulatedBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="input (N, C, H, W)")


class AccumulatedBatchNorm3d(_AccumulatedBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="input (N, C, D, H, W)")


for _class in (AccumulatedBatchNorm1d, AccumulatedBatchNorm2d, AccumulatedBatchNorm3d):
    _class._epilogue_owner = _class
