"""Swap torch.nn.BatchNorm modules for fastbn's and back, in place.

Only `__class__` changes: parameters, buffers, hooks, flags and whatever else refers to the module stay the same
objects, so optimisers built before and checkpoints written before or after keep working.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastbn import nn as layers
from fastbn.transforms.module import require_module

_Classes = Mapping[type[nn.Module], type[nn.Module]]

_TO_FASTBN: _Classes = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
}
_TO_TORCH: _Classes = {fast: stock for stock, fast in _TO_FASTBN.items()}


def convert(model: nn.Module) -> nn.Module:
    """Make every torch.nn.BatchNorm1d, 2d and 3d of `model` a fastbn one, in place.

    Only these exact types are swapped: SyncBatchNorm, Lazy*, parametrised modules and users' subclasses may override
    what fastbn would change, and are left alone. `model` may itself be a BatchNorm. A second call changes nothing.
    Keys, shapes and dtypes of the state_dict stay.

    Returns `model`. Raises TypeError if it is not a torch.nn.Module.
    """
    require_module("convert", model)
    return _swap(model, _TO_FASTBN)


def revert(model: nn.Module) -> nn.Module:
    """Make every fastbn.BatchNorm1d, 2d and 3d of `model` a torch.nn one, in place: the inverse of `convert`.

    Returns `model`. Raises TypeError if it is not a torch.nn.Module, and ValueError, before anything has changed, if a
    module has an `activation`: torch.nn's would silently leave it out.
    """
    require_module("revert", model)
    fused = [
        f"{name or '(the model itself)'}: {module.activation}"
        for name, module in model.named_modules()
        if type(module) in _TO_TORCH and module.activation is not None
    ]
    if fused:
        raise ValueError(f"revert: expected modules without an activation, got {', '.join(fused)}")
    return _swap(model, _TO_TORCH)


def _swap(model: nn.Module, classes: _Classes) -> nn.Module:
    for module in model.modules():
        target = classes.get(type(module))
        if target is not None:
            module.__class__ = target
            if classes is _TO_TORCH:
                # A module that was built as fastbn's may have the attributes in its __dict__; torch.nn's has none.
                for name in ("activation", "activation_param"):
                    vars(module).pop(name, None)
    return model
