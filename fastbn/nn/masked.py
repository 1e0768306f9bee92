"""MaskedBatchNorm1d and 2d: padding takes no part in the statistics, and comes out as 0 or as it went in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastbn.autograd.moments import channel_stats
from fastbn.autograd.statistics import Hooks, Moments, normalize, selected_moments
from fastbn.nn import scripting
from fastbn.nn.batchnorm import FastBatchNorm, leaf_of_symbolic_tracing
from fastbn.nn.running import move_running_stats
from fastbn.nn.torch_activations import ActivationLike
from fastbn.ops.dispatch import check_residual


class _Unpadded(Hooks):
    """The elements that a mask selects."""

    def __init__(self, selected: Tensor, keeps_others: bool) -> None:
        self.selected, self.keeps_others = selected, keeps_others

    def select(self, input: Tensor) -> Tensor:
        return self.selected


class _MaskedBatchNorm(FastBatchNorm):
    """Common base of MaskedBatchNorm1d and 2d: a BatchNorm, with its parameters, buffers and state, for padded data."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        padding: str = "zero",
        activation: ActivationLike = None,
        activation_param: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding not in ("zero", "keep"):
            raise ValueError(f'padding: expected "zero" or "keep", got {padding!r}')
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
        self.padding = padding

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        if isinstance(input, fx.Proxy):
            named = {"lengths": lengths, "residual": residual}
            given = {name: value for name, value in named.items() if value is not None}
            return leaf_of_symbolic_tracing(self, input, mask, **given)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        selected = _selected(input, mask, lengths)
        if residual is not None:
            check_residual(input, residual)
        if not _is_transposed(input):
            return self._of_selected(input, selected, residual)
        # (N * L, C), which the ops take where it lies
        rows = (None if t is None else t.transpose(1, 2).flatten(0, 1) for t in (input, selected, residual))
        output = self._of_selected(*rows)  # type: ignore[arg-type]
        return output.unflatten(0, (input.shape[0], input.shape[2])).transpose(1, 2)

    def _of_selected(self, input: Tensor, selected: Tensor | None, residual: Tensor | None) -> Tensor:
        if selected is None:
            return self._normalize(input, residual, self.activation, self.activation_param)
        if self.training or (self.running_mean is None and self.running_var is None):
            return self._by_batch(input, selected, residual)
        others: Tensor | float = input if self.padding == "keep" else 0.0
        if torch.is_grad_enabled():  # NaN in the padding must not reach the gradients of parameters
            input = torch.where(selected, input, 0.0)
            residual = None if residual is None else torch.where(selected, residual, 0.0)
        return torch.where(selected, self._normalize(input, residual, self.activation, self.activation_param), others)

    def _by_batch(self, input: Tensor, selected: Tensor, residual: Tensor | None) -> Tensor:
        call = self._call_by_batch(input, residual, self.activation, self.activation_param)
        output, moments = normalize(call, _Unpadded(selected, self.padding == "keep"))
        if self.training:
            move_running_stats(call.running_mean, call.running_var, call.num_batches_tracked, call.momentum, moments)
        return output

    def moments_of(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Moments:
        """Return the moments of what counts in the arguments of a forward: fastbn.population_stats asks for them."""
        return selected_moments(lambda x: channel_stats(x)[:2], input.detach(), _selected(input, mask, lengths))

    def __prepare_scriptable__(self) -> None:
        scripting.refuse(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, padding={self.padding!r}"


def _selected(input: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Return the elements that are not padding, bool (N, 1, *), or None for all of them."""
    samples, _, *spatial = input.shape
    given = mask if mask is not None else lengths
    if given is None:
        return None
    if mask is not None and lengths is not None:
        raise ValueError("MaskedBatchNorm: expected a mask or lengths, got both")
    name = "lengths" if mask is None else "mask"
    if given.device != input.device:
        raise ValueError(f"{name}: expected a tensor on {input.device}, got one on {given.device}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected torch.bool, True where an element counts, got {mask.dtype}")
        if list(mask.shape) not in ([samples, *spatial], [samples, 1, *spatial]):
            raise ValueError(
                f"mask: expected shape {[samples, *spatial]} or {[samples, 1, *spatial]}, the same for all channels, "
                f"got {list(mask.shape)}"
            )
        return mask.reshape(samples, 1, *spatial)
    if len(spatial) != 1:
        raise ValueError(f"lengths: expected an input (N, C, L), got one of shape {list(input.shape)}")
    if given.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lengths: expected torch.int64 or torch.int32, got {given.dtype}")
    if list(given.shape) != [samples]:
        raise ValueError(f"lengths: expected shape {[samples]}, got {list(given.shape)}")
    return torch.arange(spatial[0], device=given.device) < given.view(samples, 1, 1)


def _is_transposed(x: Tensor) -> bool:
    """Return whether x is a dense (N, L, C) seen as (N, C, L)."""
    return x.dim() == 3 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


_DOC = """fastbn.{name} of padded data: {shape}.

    forward(input, mask=None, *, {lengths}residual=None):
    {arguments}
    residual: the shape, dtype and device of input; it is added before the activation.
    Without mask{or_lengths} the layer is fastbn.{name}. A mask is the same for all channels.

    In training, mean and variance are those of the elements that count, and running statistics move by their mean and
    unbiased variance. Without such an element they stay as they are, though the counter moves; with one, the mean alone
    moves, and the element comes out as its bias. So the host need not know how many there are, and never waits for a
    GPU. In evaluation running statistics normalise. In both modes padding may hold anything, NaN too:
    padding="zero": it comes out as 0, and its gradient is 0.
    padding="keep": it comes out as it went in, with neither residual nor activation, and its gradient is grad_out's.

    The other arguments but `save`, parameters, buffers and state_dict are those of fastbn.{name}. Output and gradient
    have the input's memory format{strides}
    Raises ValueError for a mask{or_lengths} of another shape, dtype or device, for an input of other dimensions, in
    training for one element per channel in all, padding included, and for what the ops cannot take.
    """


class MaskedBatchNorm1d(_MaskedBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(
        name="BatchNorm1d",
        shape="(N, C) or (N, C, L)",
        lengths="lengths=None, ",
        or_lengths=" or lengths",
        arguments="""mask: bool, (N, L) or (N, 1, L), and (N,) or (N, 1) for an input (N, C); True where one counts.
    lengths: int64 or int32, (N,); the first lengths[n] elements of sample n count. Values below 0 or above L, which are
    not looked for, do as 0 and L.""",
        strides="""; a dense (N, L, C), as sequence models have it, is taken as x.transpose(1, 2) where it lies,
    and the output has the strides of that.""",
    )


class MaskedBatchNorm2d(_MaskedBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(
        name="BatchNorm2d",
        shape="(N, C, H, W)",
        lengths="",
        or_lengths="",
        arguments="mask: bool, (N, H, W) or (N, 1, H, W); True where an element counts.",
        strides=".",
    )
