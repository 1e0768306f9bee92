"""The check that every transform makes of its argument."""

from torch import nn


def require_module(caller: str, model: object) -> None:
    """Raise TypeError if `model` is not a torch.nn.Module; `caller` is the function that was given it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")
