"""Which modules get another forward, and what is known of those that have one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastbn.nn.epilogue import is_identity, known_activation, takes_epilogue
from fastbn.transforms.checkpoint import class_without_checkpoint_safety, set_class
from fastbn.transforms.fuse.layers import LAYER
from fastbn.transforms.fuse.patterns import find, merge
from fastbn.transforms.fuse.sequential import SEQUENTIAL, children_of
from fastbn.transforms.fuse.source import can_be_pickled, class_of, is_generated, write
from fastbn.transforms.fuse.trace import Refused, may_be_subclassed, trace


class Fused(NamedTuple):
    """A child of a container that takes what follows it. is_tail: also what follows the container.

    obstacle: why nothing is fused now, where a module comes first that should do nothing.
    """

    child: str
    add: bool
    activation: str | None
    is_tail: bool
    obstacle: str | None = None


def has_candidates(module: nn.Module) -> bool:
    """Return whether forward may call a child that takes an epilogue."""
    for child in module.children():
        if takes_epilogue(child) or (isinstance(child, (nn.ModuleList, nn.ModuleDict)) and has_candidates(child)):
            return True
    return False


def source_of(module: nn.Module, input_type: type = Tensor) -> str | None:
    """Return the source of a forward with fused sites, or None if there are none. Raises Refused with the reason."""
    cls: Any = type(module)
    if hasattr(cls, "_fastbn_source"):
        raise Refused(f"another tool has made a subclass of the {cls._fastbn_original.__name__} that was fused")
    if not has_candidates(module) or cls.forward is nn.Module.forward:
        return None
    source = None
    if cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__:
        found, tail = children_of(module, ever=True)  # type: ignore[arg-type]
        if tail is None and all(activation is None for _, activation in found):
            return None
        if not may_be_subclassed(cls):
            raise Refused(f"{cls.__name__} would notice that it has a subclass")
        source = SEQUENTIAL
    if not can_be_pickled(cls):
        raise Refused(f"{cls.__name__} has a __reduce__ of its own")
    if source is not None:
        return source
    if is_parametrized(module):
        raise Refused("the module has a class of its own, since its tensors are parametrised")
    if "forward" in vars(module):
        raise Refused("the module has a forward of its own")
    training, evaluation = (trace(module, mode, input_type) for mode in (True, False))
    arguments = merge(training, evaluation)
    training.guards.update(evaluation.guards)
    sites = find(training.graph, module)
    if not sites:
        return None
    return write(training, arguments, sites, input_type)


def fuse(module: nn.Module, input_type: type = Tensor) -> None:
    """Give a module another forward, if its own has sites that can be fused."""
    try:
        source = source_of(module, input_type)
        if source is not None:
            module.__class__ = class_of(type(module), source)
    except Refused:
        pass  # `report` says why


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is another library's layer, as fastbn calls it."""
    cls: Any = class_without_checkpoint_safety(type(module))
    return is_generated(cls) and cls._fastbn_source == LAYER


def unfuse(module: nn.Module) -> None:
    """Give a module that was fused its own class again."""
    cls: Any = class_without_checkpoint_safety(type(module))
    if is_generated(cls):
        set_class(module, cls._fastbn_original)


def fused_children(module: nn.Module) -> list[Fused]:
    """Return what a module with another forward fuses, as its children are now."""
    cls: Any = type(module)
    if not is_generated(cls):
        return []
    if cls._fastbn_source == SEQUENTIAL:
        found, tail = children_of(module)  # type: ignore[arg-type]
        return [Fused(name, False, activation, name == tail) for name, activation in found]
    sites = []
    for child, add, step, function, is_tail, before, between in getattr(cls, "_fastbn_sites", ()):
        name: str | None = function.rstrip("_") or None
        if step:
            known = known_activation(_step(module, step))
            name = None if known is None else known[0]
        obstacle, second = _obstacle(module, before), _obstacle(module, between)
        if second and add:
            name = None
        sites.append(Fused(child, add, name, is_tail, obstacle or (None if add else second)))
    return sites


def _obstacle(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    """Return what the first of these steps is that does something, or None if all are identities now."""
    for path in paths:
        step = _step(module, path)
        if step is None:
            return f"{path} follows in forward, and was removed"
        if not is_identity(step):
            return f"{type(step).__name__} ({path}) follows, and is active now"
    return None


def _step(module: nn.Module, path: str) -> nn.Module | None:
    """Return a module that forward calls, or None if it has been removed."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
