"""Moments as values: those of a tensor, those of several parts together, and normalisation by given ones.

Chan, Golub and LeVeque 1979 for parts of n_k elements, mean m_k and biased variance v_k:

    n = sum(n_k),   mean = sum(n_k m_k) / n,   var = sum(n_k (v_k + (m_k - mean)^2)) / n
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbn.autograd import statistics
from fastbn.autograd.statistics import Hooks, Moments, Settings
from fastbn.backends import registry
from fastbn.backends.reference import formulas
from fastbn.ops import dispatch, errors
from fastbn.ops.activations import Name as ActivationName
from fastbn.ops.activations import check_param
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Call, check_residual


def channel_stats(input: Tensor, *, backend: str | None = None) -> Moments:
    """Return the moments of each channel of a tensor, which have no gradient.

    input: (N, C, *), float32, float64, bfloat16 or float16, any strides. Returns `Moments`: `mean` and biased `var`,
    float64 (C,), and `elements`, the number of elements per channel, float64 (1,), all on the input's device. Without
    elements the three are 0. backend: as in `batch_norm`.

    Raises ValueError for an input that has no kernels, and for a named backend that cannot take it.
    """
    input = input.detach()
    call = Call(input, None, None, None, None, None, None, None, 1.0, 0, True)
    reason = dispatch.why_refused(call)
    if reason is not None:
        raise ValueError(f"channel_stats: cannot take this input: {reason}")
    ops = registry.choose(call, backend)[0].ops
    try:
        mean, var = formulas.moments(input.double()) if ops is None else ops.channel_stats(input)
    except RuntimeError as error:
        errors.raise_of_torch(error)
        raise
    return Moments(mean, var, mean.new_full((1,), input.numel() // input.shape[1]))


def merge_stats(*moments: Moments) -> Moments:
    """Return the moments of all parts together, from those of each part (Chan et al. 1979).

    Each part's `mean` and `var` are (*, C), and `elements` (*, 1), or (*, C) where channels differ in it; the result
    has the same shapes and the dtype of the parts. What a part without elements holds does not matter, and parts
    without elements beside a single other one give exactly that one; without any elements the result is 0. The order of
    the parts matters by rounding alone. Differentiable, without a host sync.

    Raises ValueError without parts, and for parts of different shapes.
    """
    if not moments:
        raise ValueError("merge_stats: expected moments of at least one part, got none")
    for name, values in zip(Moments._fields, zip(*moments, strict=True), strict=True):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(f"merge_stats: expected {name} of one shape, got {sorted(shapes)}")
    return merge_stacked(Moments(*(torch.stack(values) for values in zip(*moments, strict=True))))


def merge_stacked(moments: Moments) -> Moments:
    """Return `merge_stats` of parts that are stacked along a first dimension, of which the result has one less."""
    mean, var, elements = moments
    total = elements.sum(0)
    share = elements / total.clamp(min=1)
    has_elements = elements > 0
    # Means are added up as differences from the largest part's, so that they are exact where nothing is added to it.
    largest = elements.argmax(0, keepdim=True).expand(1, *mean.shape[1:])
    pivot = mean.detach().gather(0, largest)
    merged = pivot[0] + _sum(share, torch.where(has_elements & ~pivot.isinf(), mean - pivot, 0.0))
    squares = torch.where(has_elements, var + (mean - merged).square(), 0.0)
    return Moments(torch.where(total > 0, merged, 0.0), _sum(share, squares), total)


def _sum(share: Tensor, values: Tensor) -> Tensor:
    return (share * values).sum(0)


class _Given(Hooks):
    """Moments from outside, which are constants in backward."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def replace(self) -> Moments:
        return self.moments


def normalize(
    input: Tensor,
    moments: Moments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationName | str | None = None,
    activation_param: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return activation((input - mean) / sqrt(var + eps) * weight + bias + residual) for given moments.

    input, weight, bias, residual, activation, activation_param, backend: as in `batch_norm`; the result has the shape,
    dtype and suggested memory format of input. moments: `mean` and `var` of shape (C,), any floating dtype, on the
    input's device, as `channel_stats` and `merge_stats` return them.

    The moments are constants: input, residual, weight and bias get gradients, as they do in evaluation. Where they are
    to depend on the input, as in training, that is `batch_norm`, or a layer.

    Raises ValueError for moments of another shape or device, and for what the ops cannot take.
    """
    for name, value in (("mean", moments.mean), ("var", moments.var)):
        if input.dim() > 1 and (value.shape != input.shape[1:2] or value.device != input.device):
            raise ValueError(
                f"normalize: expected {name} of shape {[input.shape[1]]} on {input.device}, got {list(value.shape)} on "
                f"{value.device}"
            )
    if residual is not None:
        check_residual(input, residual)
    index = activation_index(activation)
    param = None if activation_param is None else check_param(index, activation_param)
    call = Call(input, residual, weight, bias, None, None, None, None, eps, index, True, param)
    reason = dispatch.why_refused(call)
    if reason is not None:
        raise ValueError(f"normalize: cannot take this call: {reason}")
    mean, var, elements = (moment.detach().double() for moment in moments)
    chosen, _ = registry.choose(call, backend)
    settings = Settings(_Given(Moments(mean, var, elements)), eps, index, param, chosen)
    return statistics.batch_norm(input, residual, weight, bias, settings)[0]
