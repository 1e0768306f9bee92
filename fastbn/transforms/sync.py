"""The class swap of `convert(model, sync=True)`, and the way back."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastbn import nn as layers
from fastbn._torch import BatchNormBase
from fastbn.transforms.checkpoint import class_without_checkpoint_safety, set_class

_LOCAL = layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d
_SYNCHRONISED = nn.SyncBatchNorm, layers.SyncBatchNorm
# The attribute in which a synchronised layer keeps the class that it had.
_BEFORE = "_before_sync"
# What a synchronised layer has in its __dict__, and the layer that it was has not.
ATTRIBUTES = _BEFORE, "process_group"


def require_no_lazy(model: nn.Module) -> None:
    """Raise ValueError for Lazy layers, which take a class that is not synchronised with their first batch."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNormBase) and isinstance(module, LazyModuleMixin):
            got = f"{type(module).__name__} at {name or '(the model itself)'}"
            raise ValueError(f"convert: expected layers that know their channels for sync=True, got {got}")


def synchronize(model: nn.Module, process_group: Any) -> None:
    """Make fastbn's BatchNorms of a model SyncBatchNorms of a group, and warn of others that stay local."""
    local = []
    for name, module in model.named_modules():
        cls: Any = class_without_checkpoint_safety(type(module))
        if cls in _LOCAL:
            vars(module).update({_BEFORE: cls, "process_group": process_group})
            set_class(module, layers.SyncBatchNorm)
        elif cls is layers.SyncBatchNorm:
            if process_group is not None:
                module.process_group = process_group
        elif isinstance(module, BatchNormBase) and not isinstance(module, _SYNCHRONISED):
            local.append(f"{name or '(the model itself)'} ({cls.__name__})")
    if local:
        warnings.warn(f"convert: statistics of {', '.join(local)} are not synchronised", stacklevel=3)


def class_before_sync(module: nn.Module) -> Any:
    """Return the class that a layer had before `synchronize`, or None for others.

    A layer that has another class by now, as a frozen one, is one of the others, although it remembers it.
    """
    is_synchronised = class_without_checkpoint_safety(type(module)) is layers.SyncBatchNorm
    return vars(module).get(_BEFORE) if is_synchronised else None


def desynchronize(model: nn.Module) -> None:
    """Give every SyncBatchNorm that `synchronize` made its own class again."""
    for module in model.modules():
        cls = class_before_sync(module)
        if cls is not None:
            set_class(module, cls)
            for name in ATTRIBUTES:
                vars(module).pop(name, None)
