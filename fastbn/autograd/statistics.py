"""Batch normalisation over the four primitives, for variants that change whose statistics normalise.

    z = ((x - mean) * inv_std * r + d) * weight + bias + residual,   output = activation(z)

A variant is a subclass of `Hooks`: it selects the elements that count, merges their moments with those of other ranks,
replaces them, or corrects the normalised value by r and d. The gradients are those of Ioffe and Szegedy 2015
(section 3), with r and d as constants (Ioffe 2017, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbn.autograd.batch_norm import below_autograd
from fastbn.backends import registry
from fastbn.backends.reference.activations import activation as activate
from fastbn.backends.reference.formulas import affine, grad_z_of, input_gradient, reduced_dims, wide
from fastbn.ops import dispatch, errors
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.dispatch import Backend, Call, check_residual
from fastbn.ops.layout import suggest_memory_format, unpack_mask


class Moments(NamedTuple):
    """The mean and biased variance, float64 [C], of `elements` elements per channel, float64 [1]."""

    mean: Tensor
    var: Tensor
    elements: Tensor


class Hooks:
    """The steps that a variant overrides. The base class is plain batch normalisation.

    Hooks compute in float64 on vectors of C elements, without a host sync. A forward calls `select`, `replace`, `merge`
    and `correct` once each, in that order, but `merge` only where `replace` returns None; a backward calls `merge_sums`
    once, also only then. No gradient flows through a hook, except the one that backward computes.

    needs_ops: whether torch's own operations cannot take a call, since they have no gradient of merged moments.
    merges: whether `merge` adds the elements of other ranks, so that one value per channel may be enough here. Then
    `merge` and `merge_sums` can be differentiated where gradients are enabled, which they are in a backward that is to
    be differentiated again.
    keeps_others: see `select`.
    """

    needs_ops = False
    merges = False
    keeps_others = False

    def select(self, input: Tensor) -> Tensor | None:
        """Return which elements count, bool (N, 1, *), or None for all.

        The others may hold anything, NaN too. They come out as 0, and their gradient is 0; if `keeps_others` is true
        they come out as they are in the input, and their gradient is grad_out's. That of the residual is 0 there.
        """
        return None

    def replace(self) -> Moments | None:
        """Return moments that take the place of the batch's and are constants in backward, or None."""
        return None

    def merge(self, moments: Moments) -> Moments:
        """Return the moments of all ranks, from those of this one."""
        return moments

    def merge_sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of grad_z and grad_z * xhat over all ranks, float64 [C], from those over this one."""
        return sum_grad, sum_grad_xhat

    def correct(self, moments: Moments) -> tuple[Tensor, Tensor] | None:
        """Return (r, d), float64 [C], or None for r = 1 and d = 0."""
        return None


class Settings(NamedTuple):
    """The arguments of StatisticsFunction beside the tensors that it differentiates."""

    hooks: Hooks
    eps: float
    activation: int
    activation_param: float | None
    backend: Backend


def batch_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, settings: Settings
) -> tuple[Tensor, Moments]:
    """Return (output, the moments that normalised it, which have no gradient).

    Forward and first derivative are the backend's primitives, or compositions of torch's operations where it has none.
    A second derivative is such a composition; RuntimeError for one through moments that `merge` changed, unless the
    hooks say that they can be differentiated.
    """
    if settings.backend.ops is None:
        return _composition(input, residual, weight, bias, settings)
    # Inference mode records nothing; a Function would, where gradients are enabled inside it.
    records_nothing = torch.no_grad() if dispatch.is_in_inference_mode() else contextlib.nullcontext()
    try:
        with records_nothing:
            output, *moments = _apply(input, residual, weight, bias, settings)
    except RuntimeError as error:
        errors.raise_of_torch(error)
        raise
    return output, Moments(*moments)


def normalize(call: Call, hooks: Hooks, backend: str | None = None) -> tuple[Tensor, Moments]:
    """Run a variant's call by the backend that serves it: (output, moments) of `batch_norm`.

    Running statistics and counter are neither read nor moved here. Raises ValueError for a call that the ops cannot
    take, since torch has no function to fall back to.
    """
    if call.residual is not None:
        check_residual(call.input, call.residual)
    reason = dispatch.why_unsupported(call, takes_one_value=hooks.merges)
    if reason is not None:
        raise ValueError(f"batch_norm: cannot take this call: {reason}")
    chosen = registry.choose_ops(call) if hooks.needs_ops and backend is None else registry.choose(call, backend)[0]
    return batch_norm(*call[:4], Settings(hooks, call.eps, call.activation, call.activation_param, chosen))


class StatisticsFunction(torch.autograd.Function):
    """The four primitives with hooks between them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        hooks, eps, activation, param, backend = settings
        with below_autograd():
            selected, replacement = hooks.select(input), hooks.replace()
            own = replacement or selected_moments(backend.ops.channel_stats, input, selected)
            moments = replacement or hooks.merge(own)
            correction = hooks.correct(moments)
            inv_std = (moments.var + eps).rsqrt()
            scale, shift = _corrected(input, weight, bias, correction)
            saves_mask = residual is not None and is_piecewise_linear(activation) and backend.saves_mask(input)
            output, mask = backend.ops.normalize(
                input, residual, scale, shift, moments.mean, inv_std, activation, saves_mask, param
            )
            _set_others(output, selected, input if hooks.keeps_others else None)
        r, d = correction or (None, None)
        saved: dict[str, Tensor | None] = dict(
            input=input, weight=weight, bias=bias, scale=scale, shift=shift, mean=moments.mean
        )
        saved |= dict(inv_std=inv_std, count=moments.elements, selected=selected, r=r, d=d)
        saved |= {"mask": mask} if saves_mask else {"residual": residual}
        saved = {name: tensor for name, tensor in saved.items() if tensor is not None}
        ctx.save_for_backward(*saved.values())
        ctx.saved_names, ctx.settings = tuple(saved), settings
        ctx.is_constant, ctx.is_merged = replacement is not None, moments is not own
        ctx.mark_non_differentiable(*moments)
        return output, *moments

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        hooks, _, activation, param, backend = ctx.settings
        saved: dict[str, Any] = dict.fromkeys(
            ("residual", "mask", "weight", "bias", "scale", "shift", "selected", "r", "d")
        )
        saved |= zip(ctx.saved_names, ctx.saved_tensors, strict=True)
        need_input, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, saved, grad_out), None
        selected, grad_others = saved["selected"], grad_out if hooks.keeps_others else None
        grad_out = _cleared(grad_out, selected)
        residual = _cleared(saved["residual"], selected) if activation != 0 else None
        names = ("mask", "scale", "shift", "mean", "inv_std")
        operands = grad_out, _cleared(saved["input"], selected), residual, *(saved[name] for name in names)
        grad_input = grad_residual = grad_weight = grad_bias = None
        totals = None, None, None
        with below_autograd():
            if need_weight or need_bias or not ctx.is_constant:
                sums = backend.ops.grad_sums(*operands, activation, param)
                grad_weight, grad_bias = _parameter_gradients(saved, *sums)
                if not ctx.is_constant:
                    totals = *hooks.merge_sums(*sums), saved["count"]
            if need_input or (need_residual and activation != 0):
                grad_input, grad_residual = backend.ops.input_grad(
                    *operands, *totals, activation, need_residual and activation != 0, param
                )
                _set_others(grad_input, selected, grad_others)
        return (
            grad_input if need_input else None,
            (grad_out if activation == 0 else grad_residual) if need_residual else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
        )


_apply: Any = StatisticsFunction.apply  # typed in some releases of torch


def _cleared(x: Any, selected: Tensor | None) -> Any:
    """Return x with 0 where it is not selected: the element there, which may be NaN, must not reach a sum."""
    return x if x is None or selected is None else torch.where(selected, x, 0.0)


def _set_others(x: Tensor, selected: Tensor | None, others: Tensor | None) -> None:
    """Set x in place to `others`, or to 0, where it is not selected."""
    if selected is None:
        return
    if others is None:
        x.masked_fill_(~selected, 0.0)
    else:
        torch.where(selected, x, others, out=x)


def selected_moments(
    channel_stats: Callable[[Tensor], tuple[Tensor, Tensor]], input: Tensor, selected: Tensor | None
) -> Moments:
    """Return the moments of the selected elements by a primitive that takes all elements."""
    total = input.numel() // input.shape[1]
    if selected is None or total == 0:
        mean, var = channel_stats(input)
        return Moments(mean, var, mean.new_full((1,), total))
    # The others are set to one element of the channel that is among the data. So what they add to the squares is about
    # as large as what the selected ones do, and known: nothing cancels.
    filling, count = _sampled(input, selected)
    mean_of_all, var_of_all = channel_stats(torch.where(selected, input, wide(input, filling)))
    others_per_selected = (total - count) / count.clamp(min=1)
    shift = mean_of_all - filling.double()
    # With n selected elements and m others, mean_of_all = (n * mean + m * filling) / (n + m), and by Chan's formula
    # var_of_all * (n + m) = n * var + n * m / (n + m) * (mean - filling)^2. Without others these are as they come.
    mean = mean_of_all + others_per_selected * shift
    var = (1 + others_per_selected) * (var_of_all - others_per_selected * shift.square()).clamp(min=0)
    return Moments(torch.where(count > 0, mean, 0.0), torch.where(count > 0, var, 0.0), count)


def _sampled(input: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the median of five selected elements per channel, [C], the number of selected ones, float64 [1]).

    The five are spread over the batch, as those of csrc/math/pivot.h are, and one that is inf or NaN counts as 0.
    """
    spatial = input.shape[2:]
    flags = selected.expand(input.shape[0], 1, *spatial).reshape(-1)
    ranks = flags.cumsum(0)
    count = ranks[-1:]
    wanted = 1 + (count - 1) * torch.arange(5, device=count.device) // 4
    at = torch.searchsorted(ranks, wanted).clamp(max=flags.shape[0] - 1)
    indices: list[Any] = []
    for size in reversed(spatial):
        indices.insert(0, at % size)
        at = at // size
    sample = input[(at, slice(None), *indices)]
    # The median by a sort: on a GPU that of torch is not deterministic, as it also returns where it found it.
    return torch.where(sample.isfinite(), sample, 0.0).sort(0).values[2], count.double()


def _count(input: Tensor, selected: Tensor) -> Tensor:
    """Return the number of selected elements per channel, float64 [1]."""
    return selected.expand(input.shape[0], 1, *input.shape[2:]).sum(dtype=torch.float64).view(1)


def _corrected(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, correction: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (weight * r, weight * d + bias), of a dtype that goes with the input."""
    if correction is None:
        return weight, bias
    r, d = correction
    scale, shift = (r, d) if weight is None else (weight * r, weight * d)
    shift = shift if bias is None else shift + bias
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return scale.to(dtype), shift.to(dtype)


def _parameter_gradients(
    saved: dict[str, Any], sum_grad: Tensor, sum_grad_xhat: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias from the sums of this rank."""
    weight, bias, r, d = (saved[name] for name in ("weight", "bias", "r", "d"))
    grad_weight = sum_grad_xhat if r is None else r * sum_grad_xhat + d * sum_grad
    return (
        None if weight is None else grad_weight.to(weight.dtype),
        None if bias is None else sum_grad.to(bias.dtype),
    )


def _differentiable_moments(x: Tensor, selected: Tensor | None) -> Moments:
    """Return the moments of a float64 x as a differentiable composition."""
    dims = reduced_dims(x)
    if selected is None:
        count = x.new_full((1,), x.numel() // x.shape[1])
        selected = torch.ones((), dtype=torch.bool, device=x.device)
    else:
        count = _count(x, selected)
    mean = torch.where(selected, x, 0.0).sum(dims) / count.clamp(min=1)
    deviation = torch.where(selected, x - wide(x, mean), 0.0)
    return Moments(mean, deviation.square().sum(dims) / count.clamp(min=1), count)


def _differentiable_backward(ctx: Any, saved: dict[str, Any], grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, residual, weight and bias as a differentiable composition in float64."""
    hooks = ctx.settings.hooks
    if ctx.is_merged and not hooks.merges:
        raise RuntimeError("batch_norm: merged moments cannot be differentiated twice")
    selected, input = saved["selected"], saved["input"]
    x, g = _cleared(input.double(), selected), _cleared(grad_out.double(), selected)
    residual = _cleared(saved["residual"], selected)
    mean, inv_std, count = saved["mean"], saved["inv_std"], saved["count"]
    if not ctx.is_constant:
        mean, var, count = hooks.merge(_differentiable_moments(x, selected))
        inv_std = (var + ctx.settings.eps).rsqrt()
    correction = None if saved["r"] is None else (saved["r"], saved["d"])
    scale, shift = _corrected(x, saved["weight"], saved["bias"], correction)
    upper = None if saved["mask"] is None else unpack_mask(saved["mask"], x.shape)
    epilogue = ctx.settings.activation, ctx.settings.activation_param
    grad_z = grad_z_of(g, x, residual, upper, scale, shift, mean, inv_std, *epilogue)
    xhat = _cleared((x - wide(x, mean)) * wide(x, inv_std), selected)
    sums = grad_z.sum(reduced_dims(x)), (grad_z * xhat).sum(reduced_dims(x))
    totals = None if ctx.is_constant else (*hooks.merge_sums(*sums), count)
    grad_x = input_gradient(grad_z, xhat, scale, inv_std, totals)
    if selected is not None:
        grad_x = torch.where(selected, grad_x, grad_out.double() if hooks.keeps_others else 0.0)
    grad_weight, grad_bias = _parameter_gradients(saved, *sums)
    grad_x = grad_x.to(input.dtype).contiguous(memory_format=suggest_memory_format(input))
    grads = grad_x, grad_z.to(input.dtype), grad_weight, grad_bias
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:4], strict=True))


def _composition(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, settings: Settings
) -> tuple[Tensor, Moments]:
    """Run a call by torch's operations in float64, which everything can look through and differentiate."""
    hooks, eps, activation, param, _ = settings
    selected, moments = hooks.select(input), hooks.replace()
    x, residual = _cleared(input.double(), selected), _cleared(residual, selected)
    if moments is None:
        own = _differentiable_moments(x, selected)
        moments = hooks.merge(own)
        if moments is not own:
            raise RuntimeError("batch_norm: torch's operations cannot differentiate merged moments")
    constants = Moments(*(moment.detach() for moment in moments))
    scale, shift = _corrected(x, weight, bias, hooks.correct(constants))
    z = affine(x, residual, scale, shift, moments.mean, (moments.var + eps).rsqrt())
    output = activate(z, activation, param).to(input.dtype)
    if selected is not None:
        output = torch.where(selected, output, input if hooks.keeps_others else 0.0)
    output = output.contiguous(memory_format=suggest_memory_format(input))
    return output, constants
