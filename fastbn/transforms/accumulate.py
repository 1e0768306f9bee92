"""fastbn.accumulate: gradient accumulation with the statistics of the whole batch, for one training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastbn import nn as layers
from fastbn.transforms.checkpoint import CheckpointSafe
from fastbn.transforms.module import ACCUMULATING, Model, require_module, require_not_accumulating

_ACCUMULATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.AccumulatedBatchNorm1d,
    nn.BatchNorm2d: layers.AccumulatedBatchNorm2d,
    nn.BatchNorm3d: layers.AccumulatedBatchNorm3d,
    layers.BatchNorm1d: layers.AccumulatedBatchNorm1d,
    layers.BatchNorm2d: layers.AccumulatedBatchNorm2d,
    layers.BatchNorm3d: layers.AccumulatedBatchNorm3d,
}
_CLASSES = layers.AccumulatedBatchNorm1d, layers.AccumulatedBatchNorm2d, layers.AccumulatedBatchNorm3d


@contextmanager
def accumulate(model: Model) -> Iterator[Model]:
    """Within the block, all forwards of `model` in training mode are micro-batches of one batch.

        with fastbn.accumulate(model):
            for input, target in micro_batches:
                (loss_of(model(input), target) / len(micro_batches)).backward()
        optimizer.step()

    Every torch.nn and fastbn BatchNorm1d, 2d and 3d (exact types, as in `fastbn.convert`) is an AccumulatedBatchNorm
    within the block, whose docstring says what is exact and what is approximate, and has its class back afterwards.
    The block's end moves the running statistics once, by those of the whole batch, and `num_batches_tracked` by 1;
    after an exception in the block nothing moves. Layers that are AccumulatedBatchNorms already end their step too.
    Parameters, hooks, fused forwards and layers in evaluation mode are as ever; other classes (SyncBatchNorm,
    BatchRenorm, timm's BatchNormAct2d) move as they do. A copy that is made within the block keeps the class, and a
    layer that is given another class there keeps that one.

    Yields `model`. Raises, before anything has changed, TypeError if it is not a torch.nn.Module, and ValueError for
    layers that `fastbn.checkpoint_safe` was called for: a recomputed forward would count twice, and for layers that are
    in such a block already. `fastbn.convert`, `revert` and `freeze` raise ValueError for these too.
    """
    require_module("accumulate", model)
    require_not_accumulating("accumulate", model)
    for name, module in model.named_modules():
        if isinstance(module, CheckpointSafe):
            raise ValueError(
                f"accumulate: expected layers without fastbn.checkpoint_safe, got one at {name or '(the model itself)'}"
            )
    before = [(module, type(module)) for module in model.modules() if type(module) in _ACCUMULATED]
    for module, cls in before:
        module.__class__ = _ACCUMULATED[cls]
    steps = [module for module in model.modules() if isinstance(module, _CLASSES)]
    ACCUMULATING.update(steps)
    try:
        yield model
        for step in steps:
            if isinstance(step, _CLASSES):  # still: the block may have given it another class
                step.finish()
    finally:
        for step in steps:
            vars(step).pop("moments", None)
            ACCUMULATING.discard(step)
        for module, cls in before:
            if type(module) is _ACCUMULATED[cls]:
                module.__class__ = cls
