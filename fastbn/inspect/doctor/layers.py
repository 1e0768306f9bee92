"""The BatchNorms of a model as `fastbn.doctor` sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbn._torch import BatchNormBase
from fastbn.nn import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

_FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)


def norms_of(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorms of `model` by their paths, those of other libraries among them."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    if is_torchs(module):
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


def is_torchs(norm: nn.Module) -> bool:
    """Return whether a BatchNorm is torch's, a subclass of it or fastbn's, so that each tensor has C values."""
    return isinstance(norm, (BatchNormBase, *_FROZEN))


def tensors_of(norm: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a layer by their names."""
    return dict(norm.named_parameters(recurse=False)) | dict(norm.named_buffers(recurse=False))


def readable(tensor: Any) -> bool:
    """Return whether a tensor has values that can be read, and are real numbers in rows.

    Those on the meta device and of Lazy layers have none; sparse, nested, quantized and complex ones are not examined.
    """
    if not isinstance(tensor, Tensor) or tensor.is_meta or nn.parameter.is_lazy(tensor):
        return False
    is_dense = tensor.layout == torch.strided and not tensor.is_nested
    return is_dense and not tensor.is_quantized and not tensor.is_complex()


def number(value: Any) -> float | None:
    """Return a setting as a float, where it is a real number or a tensor of one; None for everything else."""
    if isinstance(value, (int, float)):
        return float(value)
    return float(value.detach()) if readable(value) and value.numel() == 1 else None
