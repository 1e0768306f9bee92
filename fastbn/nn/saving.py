"""save="output" of a layer: whether its parameters allow that, asked at each call without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastbn import _torch
from fastbn.autograd.from_output import Kept, are_recoverable, kept, slope_of
from fastbn.functional import check_save
from fastbn.ops.activations import index as activation_index


class SavesOutput:
    """Mixin of a layer with the attribute `save_for_backward`, "input" or "output", a class attribute by default."""

    save_for_backward: str = "input"

    def _set_save(self, save: str) -> None:
        """Set the attribute. Raises ValueError for anything but the two."""
        check_save(save)
        if save != self.save_for_backward:
            self.save_for_backward = save

    def _describe_save(self) -> str:
        """Return what extra_repr says of the attribute."""
        return "" if self.save_for_backward == "input" else f", save={self.save_for_backward!r}"


def save_of(
    layer: Any,
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> str:
    """Return the `save` of one call of a layer whose `save_for_backward` is "output".

    It is "input" while some channel's |weight| is too small, or its |bias| too large beside it, for the input to be
    recovered from the output.
    """
    if torch.compiler.is_compiling():
        return "input"
    index = activation_index(activation)
    keeps = kept(index, activation_param, residual is not None)
    if keeps is Kept.INPUT:
        return "input"
    if keeps is Kept.BOTH or (weight is None and bias is None):
        return "output"
    slope = slope_of(index, activation_param)
    assert slope is not None

    def ask() -> Tensor:
        return are_recoverable(weight, bias, slope)

    if (weight if weight is not None else bias).is_cuda:  # type: ignore[union-attr]
        recovers = _answers.setdefault(layer, LateAnswer()).get(ask)
    else:
        recovers = bool(ask())
    return "output" if recovers else "input"


class LateAnswer:
    """A GPU's answer to a question that is asked again and again, some calls late. Only the first one is waited for.

    A late answer to `are_recoverable` is harmless: where a weight has come too close to 0 since, the gradient of that
    weight is lost for a step, and no other.
    """

    def __init__(self) -> None:
        self._known: bool | None = None
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def get(self, ask: Callable[[], Tensor]) -> bool:
        """Return the last answer that has arrived. A captured CUDA graph keeps that of its capture, or else False.

        A forward that runs again in backward gets the last answer of a forward, since it is to save the same.
        """
        if torch.cuda.is_current_stream_capturing() or (self._known is not None and _torch.is_in_backward()):
            return bool(self._known)
        if self._known is None:
            self._known = bool(ask())
        elif self._pending is None:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            on_host.copy_(ask(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = on_host, arrived
        elif self._pending[1].query():
            self._known, self._pending = bool(self._pending[0]), None
        return self._known


_answers: WeakKeyDictionary[nn.Module, LateAnswer] = WeakKeyDictionary()
