"""Freeze the BatchNorm layers of a model, in place: constant statistics that survive model.train()."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from fastbn import nn as layers
from fastbn._torch import BatchNormBase
from fastbn.transforms.checkpoint import class_without_checkpoint_safety
from fastbn.transforms.module import Model, require_module, require_not_accumulating
from fastbn.transforms.sync import class_before_sync

_FROZEN = {
    nn.BatchNorm1d: layers.FrozenBatchNorm1d,
    nn.BatchNorm2d: layers.FrozenBatchNorm2d,
    nn.BatchNorm3d: layers.FrozenBatchNorm3d,
    layers.BatchNorm1d: layers.FrozenBatchNorm1d,
    layers.BatchNorm2d: layers.FrozenBatchNorm2d,
    layers.BatchNorm3d: layers.FrozenBatchNorm3d,
}
# The attribute in which a frozen module remembers what it was: its class, and the names of what was trained.
_BEFORE = "_before_freezing"


def freeze(model: Model, *, affine: bool = True) -> Model:
    """Make every torch.nn and fastbn BatchNorm1d, 2d and 3d of `model` a FrozenBatchNorm, in place.

    From then on the running statistics normalise, whatever mode the model is in, and nothing moves them. affine: also
    stop training weight and bias (`requires_grad`). Only classes and that flag change: parameters, buffers, hooks and
    the state_dict stay, so optimisers built before and checkpoints written before or after keep working. Exact types
    only, as in `fastbn.convert`, and what it has synchronised. A warning names other BatchNorms, such as timm's
    BatchNormAct2d, whose running statistics still move.

    Returns `model`. Raises TypeError if it is not a torch.nn.Module, and ValueError, before anything has changed, if a
    layer has no running statistics, is a fastbn.SyncBatchNorm that was no BatchNorm1d, 2d or 3d before, or is within
    `fastbn.accumulate`.
    """
    require_module("freeze", model)
    require_not_accumulating("freeze", model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _class_to_freeze(module) in (*_FROZEN, layers.SyncBatchNorm)
    ]
    unknown = [name or "(the model itself)" for name, module in found if _class_to_freeze(module) not in _FROZEN]
    if unknown:
        got = ", ".join(unknown)
        raise ValueError(f"freeze: expected layers of known dimensions, got fastbn.SyncBatchNorm at {got}")
    without = [name or "(the model itself)" for name, module in found if module.running_mean is None]
    if without:
        raise ValueError(f"freeze: expected layers with running statistics, got none in {', '.join(without)}")
    for _, module in found:
        trained = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        setattr(module, _BEFORE, (type(module), trained if affine else []))
        if affine:
            module.requires_grad_(False)
        module.__class__ = _FROZEN[_class_to_freeze(module)]
    moving = [
        f"{name or '(the model itself)'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase) and module.running_mean is not None
    ]
    if moving:
        warnings.warn(f"freeze: statistics of {', '.join(moving)} are not frozen", stacklevel=2)
    return model


def _class_to_freeze(module: nn.Module) -> Any:
    """Return the class of a layer without what `checkpoint_safe` and `convert(sync=True)` made of it."""
    return class_before_sync(module) or class_without_checkpoint_safety(type(module))


def unfreeze(model: Model) -> Model:
    """Make every layer of `model` that `freeze` froze what it was, in place; others are left alone.

    Weight and bias that `freeze` stopped training are trained again. Returns `model`. Raises TypeError if it is not a
    torch.nn.Module.
    """
    require_module("unfreeze", model)
    for module in model.modules():
        before = vars(module).pop(_BEFORE, None)
        if before is not None:
            module.__class__, trained = before
            for name in trained:
                getattr(module, name).requires_grad_()
    return model
