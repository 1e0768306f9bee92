"""Enter fastbn's layers into the registries of tools that look a module up by its exact type."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any

from torch import nn

from fastbn import nn as layers

_TORCH_TO_FASTBN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
}
# Dictionaries with classes of modules as keys: the module that has them, the object in it, the attribute of that.
_REGISTRIES = (
    ("thop.profile", None, "register_hooks"),
    ("ptflops.pytorch_ops", None, "MODULES_MAPPING"),
    ("opacus.validators.module_validator", "ModuleValidator", "VALIDATORS"),
    ("opacus.validators.module_validator", "ModuleValidator", "FIXERS"),
)


def register_with_tools() -> list[str]:
    """Make thop, ptflops and opacus treat fastbn.BatchNorm1d, 2d and 3d as torch.nn's.

    Only tools that the process has imported are told, and none is imported: call it after importing them. A class that
    a registry has already is left as it is. Without it, thop and ptflops count no operations of these layers, and
    opacus' validator, which has to refuse batch normalisation, does not know them.

    Returns the names of the registries that were found.
    """
    told = []
    for module_name, object_name, attribute in _REGISTRIES:
        owner: Any = sys.modules.get(module_name)
        if owner is not None and object_name is not None:
            owner = getattr(owner, object_name, None)
        registry = getattr(owner, attribute, None)
        if isinstance(registry, MutableMapping):
            for stock, fast in _TORCH_TO_FASTBN.items():
                if stock in registry:
                    registry.setdefault(fast, registry[stock])
            told.append(".".join(part for part in (module_name, object_name, attribute) if part))
    return told
