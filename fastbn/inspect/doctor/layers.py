"""The BatchNorms of a model as `fastbn.doctor` sees them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbn._torch import BatchNormBase
from fastbn.nn import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

_FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)


def norms_of(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorms of `model` by their paths, those of other libraries among them."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    if isinstance(module, (BatchNormBase, *_FROZEN)):
        return True
    return "BatchNorm" in type(module).__name__ and all(hasattr(module, f"running_{name}") for name in ("mean", "var"))


def is_frozen(norm: nn.Module) -> bool:
    """Return whether a BatchNorm normalises by constants in every mode."""
    return isinstance(norm, _FROZEN) or "Frozen" in type(norm).__name__


def uses_batch(norm: Any) -> bool:
    """Return whether a BatchNorm, as it is now, normalises by statistics of its batch."""
    return not is_frozen(norm) and (norm.training or norm.running_mean is None)


def setting(norm: nn.Module, name: str) -> Any:
    """Return a setting of a layer (eps, momentum, num_features), None where it has none.

    Some are not attributes of fastbn's layers with an activation, so that no tool takes those for plain ones.
    """
    own = vars(norm)
    return own[name] if name in own else getattr(norm, name, None)


def readable(tensor: Any) -> bool:
    """Return whether a tensor has values that can be read, unlike those on the meta device and of Lazy layers."""
    return isinstance(tensor, Tensor) and not tensor.is_meta and not nn.parameter.is_lazy(tensor)
