"""The checks that transforms make of the model that they get."""

from typing import TypeVar
from weakref import WeakSet

from torch import nn

# What a function changes in place, and returns as the type that it is.
Model = TypeVar("Model", bound=nn.Module)

# The layers of models within a block of `fastbn.accumulate`, which have their classes for that block alone.
ACCUMULATING: WeakSet[nn.Module] = WeakSet()


def require_module(caller: str, model: object) -> None:
    """Raise TypeError if `model` is not a torch.nn.Module; `caller` is the function that was given it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")


def require_not_accumulating(caller: str, model: nn.Module) -> None:
    """Raise ValueError for a layer within a block of `fastbn.accumulate`, whose end would undo another class."""
    for name, module in model.named_modules():
        if module in ACCUMULATING:
            got = f"one in it at {name or '(the model itself)'}"
            raise ValueError(f"{caller}: expected layers outside of fastbn.accumulate, got {got}")
