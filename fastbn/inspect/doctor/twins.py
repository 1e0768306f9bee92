"""Copies of a model, to be traced, converted, run and set to other modes in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Twins:
    """Makes copies of a model in the mode that is examined. Raises what `twin_of` raises.

    as_given: whether each module of the model is in training mode, by its path. examined: the same in the mode that is
    examined. after_train: the same after `.train()`, which the class of a module may override.
    """

    def __init__(self, model: nn.Module, training: bool | None) -> None:
        self._model, self._training = model, training
        self.as_given = modes_of(model)
        self.examined = modes_of(self.make())
        self.after_train = modes_of(twin_of(model).train())

    def make(self) -> nn.Module:
        twin = twin_of(self._model)
        return twin if self._training is None else twin.train(self._training)


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Return whether each module is in training mode, by its path."""
    return {name: module.training for name, module in model.named_modules()}


def twin_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model` whose parameters are other objects in the same memory. Its buffers are copies.

    Raises TypeError for TorchScript, and what `copy.deepcopy` raises.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("it is compiled by TorchScript")  # its copies share their methods
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            twin = nn.Parameter(parameter.detach(), parameter.requires_grad)
            vars(twin).update(vars(parameter))
            memo[id(parameter)] = twin
    with torch.no_grad():
        return copy.deepcopy(model, memo)


def device_of(model: nn.Module) -> torch.device:
    """Return where the first parameter or buffer of a model is, the CPU for a model without any."""
    return next(_tensors(model), torch.empty(0)).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter or buffer of a model, float32 for a model without any."""
    return next((t.dtype for t in _tensors(model) if t.is_floating_point()), torch.float32)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
