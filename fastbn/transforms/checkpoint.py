"""fastbn.checkpoint_safe: running statistics move once a step, although a checkpoint runs forwards twice.

torch.utils.checkpoint keeps no activations of a forward and runs it again in backward. The batch is the same then, and
so is the output, but running statistics and the counter would move a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastbn import nn as layers
from fastbn._torch import BatchNormBase, is_exporting, is_in_backward, without_dispatch_modes
from fastbn.nn.batchnorm import leaf_of_symbolic_tracing
from fastbn.nn.epilogue import Epilogue
from fastbn.nn.scripting import in_place_of
from fastbn.transforms.module import Model, require_module

_REFUSED = (
    *(layers.BatchRenorm1d, layers.BatchRenorm2d, layers.BatchRenorm3d),
    *(layers.AccumulatedBatchNorm1d, layers.AccumulatedBatchNorm2d, layers.AccumulatedBatchNorm3d),
)
_NORMS = (BatchNormBase, layers.WhiteningBatchNorm1d, layers.WhiteningBatchNorm2d)


# A CUDA graph would keep the answer of the run that was captured.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@torch.library.custom_op("fastbn_transforms::is_in_backward", mutates_args=(), tags=_TAGS)
def _is_in_backward(like: Tensor) -> Tensor:
    """Return `is_in_backward` at run time as a bool tensor of no dimensions: Dynamo cannot guard on it."""
    return torch.full((), is_in_backward(), dtype=torch.bool, device=like.device)


@_is_in_backward.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


class CheckpointSafe(nn.Module):
    """The part of a safe layer's class that comes before the layer's own class."""

    _unsafe: Any  # the layer's own class

    def _forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, fx.Proxy):
            return leaf_of_symbolic_tracing(self, input, *args, **kwargs)
        return self._call(self._unsafe.forward, input, *args, **kwargs)

    def _with_epilogue(self, input: Tensor, epilogue: Epilogue) -> Any:
        """The other way into a layer: only called if the layer's own class has it."""
        return self._call(self._unsafe._with_epilogue, input, epilogue)

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the layer's own class, in which running statistics move unless it is a recomputation."""
        if self.training and not is_exporting():
            if torch.compiler.is_compiling():
                return self._call_traced(method, *args, **kwargs)
            if is_in_backward():
                # Checkpoints compare what is saved, and selective ones which ops run, so the buffers cannot just be
                # left out. They belong to a twin, so that the layer itself never holds other values.
                with without_dispatch_modes():
                    copies = {name: None if b is None else b.detach().clone() for name, b in self._buffers.items()}
                return method(self._twin(_buffers=copies, twin_of=self), *args, **kwargs)
        return method(self, *args, **kwargs)

    def _call_traced(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method, and undo its updates if that turns out to be within a backward.

        A graph that has the checkpoint inside updates buffers once anyway; one that is checkpointed as a whole runs
        again in backward.
        """
        before = [(b, b.clone()) for b in self._buffers.values() if b is not None]
        output = method(self, *args, **kwargs)
        if before:
            recomputes = _is_in_backward(before[0][1])
            for buffer, old in before:
                # torch's own op saves the buffers for backward, where it does not read them: .data moves no version.
                buffer.data.copy_(torch.where(recomputes, old, buffer))
        return output

    def _twin(self, **attributes: Any) -> Any:
        """Return a layer of the own class that shares everything with this one, except for `attributes`."""
        twin = object.__new__(self._unsafe)
        vars(twin).update(vars(self), **attributes)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = self._twin().__reduce_ex__(protocol)
        return _new, (make, args), *rest


_CLASSES: dict[Any, Any] = {}


def _safe_class(cls: Any) -> Any:
    """Return the safe class of the layers of class `cls`, the same one each time."""
    if cls not in _CLASSES:
        # A function for each class, since torch.jit.script compiles what it stands for.
        forward = in_place_of(cls.forward, lambda self, *args, **kwargs: self._forward(*args, **kwargs))
        body = {"_unsafe": cls, "__doc__": cls.__doc__, "forward": forward}
        made: Any = type(f"CheckpointSafe{cls.__name__}", (CheckpointSafe, cls), body)
        if getattr(cls, "_epilogue_owner", None) is cls:
            made._epilogue_owner = made
        _CLASSES[cls] = made
    return _CLASSES[cls]


def _new(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return a safe layer without its attributes, which pickle and copy set: `make(*args)` is one that is not safe."""
    layer = make(*args)
    layer.__class__ = _safe_class(type(layer))
    return layer


def class_without_checkpoint_safety(cls: Any) -> Any:
    """Return the class that a layer had before `checkpoint_safe`, for tables by exact type."""
    return cls._unsafe if issubclass(cls, CheckpointSafe) else cls


def set_class(module: nn.Module, cls: Any) -> None:
    """Give a module another class; a layer that is checkpoint safe stays so."""
    module.__class__ = _safe_class(cls) if isinstance(module, CheckpointSafe) else cls


def checkpoint_safe(model: Model, *, enabled: bool = True) -> Model:
    """Make the BatchNorms of `model` move running statistics once a step under activation checkpointing, in place.

    A forward in training mode that runs within a backward is taken for a recomputation: it normalises by the same
    batch statistics, and leaves running_mean, running_var and num_batches_tracked alone. So it is for
    torch.utils.checkpoint with and without `use_reentrant`, with selective policies and nested, for other code that
    recomputes in backward, and under torch.compile, whether the checkpoint is inside the graph or around it; and for
    torch.nn's and fastbn's BatchNorms, SyncBatchNorm and subclasses of them that normalise by the batch, and for
    WhiteningBatchNorm. Only classes change: parameters, buffers, hooks and the state_dict stay. enabled=False: make
    them what they were.

    `fastbn.convert` may come before or after it, and what it fuses stays fused: `convert(model, checkpoint_safe=True)`
    does both, and `fastbn.revert` undoes both. Other tables by exact type do not know the new classes.

    Returns `model`. Raises TypeError if it is not a torch.nn.Module, and ValueError, before anything has changed, for
    BatchRenorm, whose training depends on running statistics that have moved by then, for AccumulatedBatchNorm, whose
    depends on the micro-batches before, and for Lazy layers, which take another class with their first batch.
    """
    require_module("checkpoint_safe", model)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
    if not enabled:
        for _, module in norms:
            module.__class__ = class_without_checkpoint_safety(type(module))
        return model
    for name, module in norms:
        if isinstance(module, _REFUSED) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
            got = f"{type(module).__name__} at {name or '(the model itself)'}"
            raise ValueError(f"checkpoint_safe: expected layers that normalise by the batch alone, got {got}")
    for _, module in norms:
        if not isinstance(module, CheckpointSafe):
            module.__class__ = _safe_class(type(module))
    return model
