"""Swap the BatchNorm layers of a model between torch.nn's and fastbn's, in place, and fuse what follows them.

Parameters, buffers, hooks, training flags and optimisers are untouched: only the classes of modules change, those of
the layers and those of the modules whose forward calls a layer and what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastbn import nn as layers
from fastbn.functional import check_save
from fastbn.nn.saving import SavesOutput
from fastbn.transforms import checkpoint, registry
from fastbn.transforms.checkpoint import class_without_checkpoint_safety, set_class
from fastbn.transforms.fuse import containers
from fastbn.transforms.fuse.layers import LAYER, LAYERS
from fastbn.transforms.fuse.source import class_of
from fastbn.transforms.module import Model, require_module, require_not_accumulating
from fastbn.transforms.report import report
from fastbn.transforms.sync import ATTRIBUTES as SYNC_ATTRIBUTES
from fastbn.transforms.sync import desynchronize, require_no_lazy, synchronize

_Classes = Mapping[type[nn.Module], type[nn.Module]]

_TO_FASTBN: _Classes = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.LazyBatchNorm1d: layers.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: layers.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: layers.LazyBatchNorm3d,
    nn.SyncBatchNorm: layers.SyncBatchNorm,
}
_TO_TORCH: _Classes = {fast: stock for stock, fast in _TO_FASTBN.items()}
# Class attributes of fastbn's layers, which an instance may have in its __dict__ too.
_ATTRIBUTES = "activation", "activation_param", "save_for_backward"


def convert(
    model: Model,
    *,
    fuse: bool = True,
    save: str | None = None,
    checkpoint_safe: bool = False,
    verbose: bool = False,
    sync: bool = False,
    process_group: Any = None,
) -> Model:
    """Make every torch.nn.BatchNorm1d, 2d and 3d of `model` a fastbn one, and fuse what follows it, in place.

    Only these exact types, their Lazy ones and SyncBatchNorm are swapped, and those that `fastbn.transforms.register`
    knows: parametrised modules and users' subclasses may override what fastbn would change, and are left alone.
    `model` may itself be a BatchNorm. Keys, shapes and dtypes of the state_dict stay, and so does every module.

    fuse: also give modules whose forward calls a layer, and then an addition, an activation or both, another forward,
    in which one op does all of that: nn.Sequential, and what torch.fx can trace. At each call it is decided whether the
    op may do it, by the modules as they are then: hooks, replaced modules, methods and forwards, and a residual of
    another shape, dtype or layout are run as before. A second call fuses what has been added to the model.
    save: "input" or "output", the argument of that name of fastbn's layers; None to leave it as it is.
    checkpoint_safe: also call `fastbn.checkpoint_safe(model)`. Layers that it has been called for stay safe anyway.
    verbose: print what was fused, what not and why: `fastbn.transforms.report(model)` as text.
    sync: make them, and fastbn's own, fastbn.SyncBatchNorm, which fuses what follows it as they do. `revert` gives back
    the class that each had. Warns of normalisations by batch statistics that are left as they are, since they stay
    local. process_group: the processes that share statistics, for SyncBatchNorm layers from before too; None for all,
    and for those from before the group that they have.

    Returns `model`. Raises, before anything has changed, TypeError if it is not a torch.nn.Module, ValueError for
    another `save`, for a process_group without `sync`, for Lazy layers with it, for layers within `fastbn.accumulate`,
    and what `fastbn.checkpoint_safe` raises.
    """
    require_module("convert", model)
    require_not_accumulating("convert", model)
    if save is not None:
        check_save(save)
    if sync:
        require_no_lazy(model)
    elif process_group is not None:
        raise ValueError("convert: expected sync=True beside a process_group, got sync=False")
    if checkpoint_safe:
        checkpoint.checkpoint_safe(model)
    registry.resolve(model)
    _swap(model, _TO_FASTBN)
    if sync:
        synchronize(model, process_group)
    for module in model.modules():
        cls = class_without_checkpoint_safety(type(module))
        if cls in LAYERS:
            set_class(module, class_of(cls, LAYER))
    if save is not None:
        for module in model.modules():
            if isinstance(module, SavesOutput):
                module._set_save(save)
    if fuse:
        for module in reversed(list(model.modules())):  # children first: whether they take an epilogue matters
            if not containers.is_layer(module):
                containers.unfuse(module)  # what was fused before may have been changed since
                containers.fuse(module, registry.INPUT_TYPES.get(type(module), Tensor))
    if verbose:
        print(report(model))
    return model


def revert(model: Model) -> Model:
    """Give every module of `model` that `convert` gave another class its own again, in place.

    fastbn.BatchNorm1d, 2d and 3d, the Lazy ones and SyncBatchNorm become torch.nn's, wherever they come from, and what
    `fastbn.checkpoint_safe` did is undone too. What `convert` has synchronised becomes the BatchNorm that it was.
    Frozen layers stay frozen: `fastbn.unfreeze` comes first.

    Returns `model`. Raises TypeError if it is not a torch.nn.Module, and ValueError, before anything has changed, if a
    module has an `activation` of its own, which torch.nn's would silently leave out, or is within `fastbn.accumulate`.
    """
    require_module("revert", model)
    require_not_accumulating("revert", model)
    fused = [
        f"{name or '(the model itself)'}: {module.activation}"
        for name, module in model.named_modules()
        if class_without_checkpoint_safety(type(module)) in _TO_TORCH and module.activation is not None
    ]
    if fused:
        raise ValueError(f"revert: expected modules without an activation, got {', '.join(fused)}")
    checkpoint.checkpoint_safe(model, enabled=False)
    for module in model.modules():
        containers.unfuse(module)
    desynchronize(model)
    return _swap(model, _TO_TORCH)


@contextmanager
def reverted(model: Model) -> Iterator[Model]:
    """Within the block, `model` is as `revert` leaves it; afterwards its modules have the classes that they had.

    For tools that know layers by their exact type. Modules that the tool has replaced, or given another class, stay as
    it left them. Raises what `revert` raises.
    """
    require_module("reverted", model)
    before = [(module, type(module), _own_attributes(module, SYNC_ATTRIBUTES)) for module in model.modules()]
    revert(model)
    changed = [(module, type(module), cls, own) for module, cls, own in before if type(module) is not cls]
    try:
        yield model
    finally:
        for module, stock, cls, own in changed:
            if type(module) is stock:
                module.__class__ = cls
                vars(module).update(own)


def _own_attributes(module: nn.Module, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the attributes in a module's __dict__ that torch.nn's modules do not have, and `more`."""
    return {name: vars(module)[name] for name in (*_ATTRIBUTES, *more) if name in vars(module)}


def _swap(model: Model, classes: _Classes) -> Model:
    for module in model.modules():
        target = classes.get(class_without_checkpoint_safety(type(module)))
        if target is not None:
            set_class(module, target)
            if classes is _TO_TORCH:
                for name in _own_attributes(module):
                    del vars(module)[name]
    return model
