"""What `fastbn.convert` made of the normalisations of a model, and why not more."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastbn._torch import BatchNormBase
from fastbn.nn.epilogue import NormalizationLayer, known_activation
from fastbn.transforms import registry
from fastbn.transforms.checkpoint import class_without_checkpoint_safety
from fastbn.transforms.fuse import containers
from fastbn.transforms.fuse.layers import LAYERS
from fastbn.transforms.fuse.source import is_generated
from fastbn.transforms.fuse.trace import Refused
from fastbn.transforms.module import require_module


@dataclass(frozen=True)
class LayerReport:
    """One layer: its path and class, and what one op does.

    status: "fused", "converted" (without what follows), or "left" (not fastbn's). add, activation: what is fused.
    container: the path of the module whose forward has the addition and activation. reason: why no more is fused.
    """

    path: str
    kind: str
    status: str
    add: bool = False
    activation: str | None = None
    container: str | None = None
    reason: str = ""

    @property
    def outcome(self) -> str:
        if self.status != "fused":
            return self.status
        return "fused with " + " and ".join([*["addition"] * self.add, *([self.activation] if self.activation else [])])


@dataclass(frozen=True)
class Report:
    """All layers of a model in its order. calls: (path, class) of modules whose forward names batch_norm itself."""

    layers: tuple[LayerReport, ...]
    calls: tuple[tuple[str, str], ...]

    def count(self, status: str) -> int:
        return sum(layer.status == status for layer in self.layers)

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.outcome, layer.reason].append(layer.path)
        counts = ", ".join(f"{self.count(status)} {status}" for status in ("fused", "converted", "left"))
        lines = [f"{len(self.layers)} layers: {counts}"]
        for (outcome, reason), paths in groups.items():
            shown = ", ".join(path or "(the model itself)" for path in paths[:4]) + ", ..." * (len(paths) > 4)
            lines.append(f"{len(paths):5} {outcome}{': ' * bool(reason)}{reason} ({shown})")
        lines += [f"      {kind} ({path}) calls batch_norm itself, which stays" for path, kind in self.calls]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Return what is fused, converted and left of `model`'s normalisations, as its modules are now; nothing changes.

    Raises TypeError if it is not a torch.nn.Module.
    """
    require_module("report", model)
    registry.resolve(model)
    fused: dict[nn.Module, tuple[bool, str | None, str]] = {}
    refusals: dict[nn.Module, str] = {}
    calls = []
    for path, module in model.named_modules():
        for site in containers.fused_children(module):
            if site.add or site.activation:
                layer = _innermost(module.get_submodule(site.child))
                if layer is not None and site.obstacle:
                    refusals[layer] = site.obstacle
                elif layer is not None:
                    fused[layer] = site.add, site.activation, path
        if not is_generated(type(module)):
            reason = _why_not_fused(module)
            for child in _children(module) if reason else ():
                refusals[child] = f"{type(module).__name__}: {reason}"
            if not _is_layer(module) and _names_batch_norm(module):
                calls.append((path, type(module).__name__))
    layers = [_of_layer(path, module, fused, refusals) for path, module in model.named_modules() if _is_layer(module)]
    return Report(tuple(layers), tuple(calls))


_OF_TORCH = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
    nn.SyncBatchNorm,
)


def _of_layer(
    path: str,
    module: nn.Module,
    fused: dict[nn.Module, tuple[bool, str | None, str]],
    refusals: dict[nn.Module, str],
) -> LayerReport:
    cls = class_without_checkpoint_safety(type(module))
    kind = cls.__name__
    own = _own_activation(module, path)
    if module in fused or own is not None:
        add, activation, container = own or fused[module]
        return LayerReport(path, kind, "fused", add, activation, container)
    if isinstance(module, NormalizationLayer) or containers.is_layer(module):
        reason = refusals.get(module, "nothing follows that can be fused, or something else reads the result")
        return LayerReport(path, kind, "converted", reason=reason)
    if cls in _OF_TORCH or cls in LAYERS:
        return LayerReport(path, kind, "left", reason="not converted")
    return LayerReport(path, kind, "left", reason=f"{kind} is not known: fastbn.transforms.register")


def _own_activation(module: nn.Module, path: str) -> tuple[bool, str | None, str] | None:
    """Return what a layer fuses that has its activation itself."""
    if containers.is_layer(module):
        cls: Any = class_without_checkpoint_safety(type(module))
        for step in LAYERS[cls._fastbn_original].steps(module):
            known = known_activation(step)
            if known is not None:
                return False, known[0], path
    activation = getattr(module, "activation", None)
    if isinstance(module, NormalizationLayer) and activation is not None:
        return False, activation, path
    return None


def _is_layer(module: nn.Module) -> bool:
    return (
        isinstance(module, (BatchNormBase, NormalizationLayer)) or type(module) in LAYERS or containers.is_layer(module)
    )


def _innermost(module: nn.Module) -> nn.Module | None:
    """Return the layer that takes the epilogue which a child is given."""
    while not _is_layer(module):
        tail = next((site for site in containers.fused_children(module) if site.is_tail), None)
        if tail is None or tail.activation is not None or tail.add or tail.obstacle:
            return None
        module = module.get_submodule(tail.child)
    return module


def _why_not_fused(module: nn.Module) -> str | None:
    try:
        containers.source_of(module, registry.INPUT_TYPES.get(type(module), Tensor))
    except Refused as refused:
        return str(refused)
    return None


def _children(module: nn.Module) -> list[nn.Module]:
    """Return the layers that the forward of a module may call."""
    found = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += _children(child)
        else:
            found.append(child)
    return found


def _names_batch_norm(module: nn.Module) -> bool:
    if type(module).__module__.startswith(("torch.nn.", "fastbn.")):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and bool({"batch_norm", "instance_batch_norm"} & set(code.co_names))
