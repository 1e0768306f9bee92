"""The pairs that fastbn.fold folds, and why others are left: from the graphs of a model's forwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fastbn import nn as layers
from fastbn.transforms.calls import Calls, Site, find_calls
from fastbn.transforms.checkpoint import class_without_checkpoint_safety

# The dimensions of an output of each kind that is folded into; transposed kinds have output channels in dimension 1.
DIMS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
# Methods by which a subclass may compute something else.
_FORWARD = frozenset(("forward", "_conv_forward", "__call__"))
# Layers that in evaluation normalise dimension 1 by running statistics, and whether they take one number of dimensions.
_NORMS: dict[type[nn.Module], bool] = {
    nn.BatchNorm1d: False,
    nn.BatchNorm2d: True,
    nn.BatchNorm3d: True,
    nn.SyncBatchNorm: False,
    layers.BatchNorm1d: False,
    layers.BatchNorm2d: True,
    layers.BatchNorm3d: True,
    layers.BatchRenorm1d: False,
    layers.BatchRenorm2d: True,
    layers.BatchRenorm3d: True,
    layers.FrozenBatchNorm1d: False,
    layers.SyncBatchNorm: False,
    layers.FrozenBatchNorm2d: True,
    layers.FrozenBatchNorm3d: True,
    layers.GhostBatchNorm1d: False,
    layers.GhostBatchNorm2d: True,
    layers.GhostBatchNorm3d: True,
}
# Layers of packages that need not be installed, and what they call after the normalisation: names of children.
NORMS_BY_NAME: dict[str, tuple[str, ...]] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": (),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": (),
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
    "timm.layers.norm_act.SyncBatchNormAct": ("drop", "act"),
    "timm.layers.norm_act.FrozenBatchNormAct2d": ("drop", "act"),
}


@dataclass(frozen=True)
class Pair:
    """A BatchNorm and the layer that takes it up."""

    norm: nn.Module
    into: nn.Module
    adds: bool  # whether the call of `norm` has a residual


def find_pairs(model: nn.Module) -> list[tuple[nn.Module, Pair | str]]:
    """Return each BatchNorm of `model` with the pair in which it is folded, or why it is left."""
    names = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if _looks_like_batch_norm(module)]
    calls = find_calls(model) if norms else Calls()
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return [(norm, _pair_of(norm, calls, names, owners)) for norm in norms]


def _looks_like_batch_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, tuple(_NORMS)) or ("BatchNorm" in name and hasattr(module, "running_mean"))


def takes_one_number_of_dims(norm: nn.Module) -> bool | None:
    """Return the entry of `_NORMS`, None for a class that is not known."""
    cls = class_without_checkpoint_safety(type(norm))
    if full_name(cls) in NORMS_BY_NAME:
        return True
    kind = kind_of(cls, _NORMS)
    return None if kind is None else _NORMS[kind]


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(cls: type[nn.Module], kinds: Iterable[type[nn.Module]]) -> type[nn.Module] | None:
    """Return which of `kinds` computes what `cls` does: itself, or a base whose forward it inherits; None if none."""
    for base in cls.__mro__:
        if base in kinds:
            return base
        if not _FORWARD.isdisjoint(vars(base)):
            return None
    return None


def _pair_of(norm: Any, calls: Calls, names: dict[nn.Module, str], owners: dict[Tensor, set[nn.Module]]) -> Pair | str:
    """Return the pair in which `norm` is folded, or why it is left."""
    if takes_one_number_of_dims(norm) is None:
        return f"fold does not know what {type(norm).__name__} computes"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    sites = calls.callers.get(norm, [])
    if not sites:
        return "no forward that torch.fx can trace calls it"
    if len(sites) > 1:
        return "it is called in more than one place"
    pairs = set()
    for graph in sites[0].graphs:
        found = _pair_in(graph, sites[0], norm, names)
        if isinstance(found, str):
            return found
        pairs.add(found)
    if len(pairs) > 1:
        return "what comes before it depends on arguments"
    pair: Any = pairs.pop()
    return _why_not(pair, sites[0], calls, names, owners) or pair


def _pair_in(graph: fx.Graph, site: Site, norm: nn.Module, names: dict[nn.Module, str]) -> Pair | str:
    """Return the pair of `norm` in one graph of the forward that calls it, or why there is none."""
    modules = {node: site.owner.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    found = [node for node, module in modules.items() if module is norm]
    if len(found) != 1:
        return "it is called more than once" if found else "whether it is called depends on arguments"
    (node,) = found
    arguments = dict(zip(("input", "residual"), node.args)) | node.kwargs
    source, residual = arguments.get("input"), arguments.get("residual")
    into = modules.get(source) if isinstance(source, fx.Node) else None
    if into is None or kind_of(type(into), DIMS) is None:
        what = "an operation" if into is None else f"{names[into]} ({type(into).__name__})"
        reason = f"its input is from {what}, not from a convolution or Linear"
        if any(user in modules and kind_of(type(modules[user]), DIMS) for user in node.users):
            reason += "; a BatchNorm before a convolution cannot be folded, since padding comes after it"
        return reason
    if sum(module is into for module in modules.values()) > 1:
        return f"{names[into]} is called more than once"
    if set(source.users) != {node}:
        return f"something else reads the output of {names[into]}"
    return Pair(norm, into, residual is not None)


def _why_not(
    pair: Pair, site: Site, calls: Calls, names: dict[nn.Module, str], owners: dict[Tensor, set[nn.Module]]
) -> str | None:
    """Return why a pair that is called as such is left, or None."""
    into: Any = pair.into
    norm: Any = pair.norm
    name = names[into]
    if len(calls.callers[into]) > 1:
        return f"{name} is called in more than one place"
    if site.owner in calls.opened:
        return f"{calls.opened[site.owner]}, whose forward cannot be traced, may call {name} by itself"
    for module in (norm, into):
        last = names[module].rpartition(".")[2]
        if last in calls.reached:
            return f"{calls.reached[last]}, whose forward cannot be traced, uses an attribute {last}"
        if module in calls.read:
            return f"a forward uses {names[module]} without calling it"
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            return f"{names[module]} has hooks"
        if "forward" in vars(module):
            return f"{names[module]} has a forward of its own"
    weight = into._parameters.get("weight")  # a parametrised one is not among them
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"the weight of {name} is no plain parameter of a floating-point type"
    tied = {owner for parameter in into.parameters(recurse=False) for owner in owners[parameter]} - {into}
    if tied:
        return f"{name} shares a parameter with {', '.join(sorted(names[module] for module in tied))}"
    channels, features = norm.running_mean.numel(), _out_channels(into)
    if channels != features:
        return f"it normalises {channels} channels, but {name} has {features}"
    return None


def _out_channels(into: Any) -> int:
    return into.out_features if isinstance(into, nn.Linear) else into.out_channels
