"""fastbn.fold: the BatchNorms of a model in evaluation become part of the convolution or Linear before them.

    conv(x, W) + b  ->  conv(x, W * s) + (b - running_mean) * s + bias,   s = weight / sqrt(running_var + eps)

A BatchNorm before a convolution is left: with padding, the zeros around a normalised image are other numbers before
the normalisation, so no bias stands for them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastbn import nn as layers
from fastbn.nn.folded import FoldedBatchNorm, activation_module
from fastbn.transforms.calls import Calls, Site, find_calls
from fastbn.transforms.checkpoint import class_without_checkpoint_safety
from fastbn.transforms.module import require_module

# The dimensions of an output of each kind that is folded into; transposed kinds have output channels in dimension 1.
_DIMS: dict[type[nn.Module], int] = {
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
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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
    layers.FrozenBatchNorm2d: True,
    layers.FrozenBatchNorm3d: True,
}
# Layers of packages that need not be installed, and what they call after the normalisation: names of children.
_NORMS_BY_NAME: dict[str, tuple[str, ...]] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": (),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": (),
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
    "timm.layers.norm_act.SyncBatchNormAct": ("drop", "act"),
    "timm.layers.norm_act.FrozenBatchNormAct2d": ("drop", "act"),
}


@dataclass(frozen=True)
class Folded:
    """A BatchNorm that is folded, and the module whose weight and bias take it up, by their names."""

    norm: str
    into: str


@dataclass(frozen=True)
class Left:
    """A BatchNorm that is left as it is, by its name, and the reason."""

    norm: str
    reason: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold` does to the BatchNorms of a model, in the order of the model's modules."""

    folded: tuple[Folded, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"fold: {len(self.folded)} of {len(self.folded) + len(self.left)} BatchNorm layers folded"]
        lines += [f"  left {left.norm}: {left.reason}" for left in self.left]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Pair:
    norm: nn.Module
    into: nn.Module
    adds: bool  # whether the call of `norm` has a residual


def fold(model: nn.Module, *, inplace: bool = False, verbose: bool = False) -> nn.Module:
    """Return a copy of `model` for inference, in which BatchNorms are folded into the layer before them.

    Conv1d, 2d, 3d, ConvTranspose1d, 2d, 3d and Linear take up torch.nn's and fastbn's BatchNorms, SyncBatchNorm,
    BatchRenorms and FrozenBatchNorms, the frozen ones of torchvision and detectron2, and timm's BatchNormAct2d. New
    weights are computed in float64 and rounded once to the layer's dtype; a layer without bias gets one. The BatchNorm
    becomes an nn.Identity, or the module of its activation, so that the names and indices of all other modules stay.

    A pair is folded if the forward of the module that calls both, traced by torch.fx part by part, gives the layer's
    output to the BatchNorm and to nothing else, and calls each once. Layers with hooks, with tied or parametrised
    weights, or of subclasses with a forward of their own are left, and so are BatchNorms without running statistics
    or before a convolution. Forwards that cannot be traced are taken to call their children only as they are, unless
    their source says otherwise. `fastbn.transforms.fold.examine` returns what is folded and why the rest is left;
    verbose: print it.

    inplace: change `model` itself, which needs no memory for a copy; nothing undoes it. Folded behind a Linear or by a
    layer that takes several numbers of dimensions, the place of the BatchNorm raises AssertionError for an input of
    another number of dimensions than the fold assumes.

    Raises TypeError if `model` is not a torch.nn.Module, and ValueError, before anything has changed, if it is not in
    evaluation mode.
    """
    _require_evaluation(model)
    if not inplace:
        model = copy.deepcopy(model)
    pairs, report = _find(model)
    with torch.no_grad():
        for pair in pairs:
            _fold_pair(pair)
    if verbose:
        print(report)
    return model


def examine(model: nn.Module) -> FoldReport:
    """Return what `fold` would fold of `model` and leave, and why, and change nothing. Raises what `fold` raises."""
    _require_evaluation(model)
    return _find(model)[1]


def _require_evaluation(model: nn.Module) -> None:
    require_module("fold", model)
    training = [name or "(the model itself)" for name, module in model.named_modules() if module.training]
    if training:
        got = training[0] + (f" and {len(training) - 1} more" if len(training) > 1 else "")
        raise ValueError(f"fold: expected a model in evaluation mode (model.eval()), got {got} in training mode")


def _find(model: nn.Module) -> tuple[list[_Pair], FoldReport]:
    """Return the pairs to fold, and the report on all BatchNorms."""
    names = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if _looks_like_batch_norm(module)]
    calls = find_calls(model) if norms else Calls()
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    pairs, folded, left = [], [], []
    for norm in norms:
        found = _pair_of(norm, calls, names, owners)
        if isinstance(found, str):
            left.append(Left(names[norm] or "(the model itself)", found))
        else:
            pairs.append(found)
            folded.append(Folded(names[norm], names[found.into]))
    return pairs, FoldReport(tuple(folded), tuple(left))


def _looks_like_batch_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, tuple(_NORMS)) or ("BatchNorm" in name and hasattr(module, "running_mean"))


def _takes_one_number_of_dims(norm: nn.Module) -> bool | None:
    """Return the entry of `_NORMS`, None for a class that is not known."""
    cls = class_without_checkpoint_safety(type(norm))
    if _full_name(cls) in _NORMS_BY_NAME:
        return True
    kind = _kind(cls, _NORMS)
    return None if kind is None else _NORMS[kind]


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _kind(cls: type[nn.Module], kinds: Iterable[type[nn.Module]]) -> type[nn.Module] | None:
    """Return which of `kinds` computes what `cls` does: itself, or a base whose forward it inherits; None if none."""
    for base in cls.__mro__:
        if base in kinds:
            return base
        if not _FORWARD.isdisjoint(vars(base)):
            return None
    return None


def _pair_of(norm: Any, calls: Calls, names: dict[nn.Module, str], owners: dict[Tensor, set[nn.Module]]) -> _Pair | str:
    """Return the pair in which `norm` is folded, or why it is left."""
    if _takes_one_number_of_dims(norm) is None:
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


def _pair_in(graph: fx.Graph, site: Site, norm: nn.Module, names: dict[nn.Module, str]) -> _Pair | str:
    """Return the pair of `norm` in one graph of the forward that calls it, or why there is none."""
    modules = {node: site.owner.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    found = [node for node, module in modules.items() if module is norm]
    if len(found) != 1:
        return "it is called more than once" if found else "whether it is called depends on arguments"
    (node,) = found
    arguments = dict(zip(("input", "residual"), node.args)) | node.kwargs
    source, residual = arguments.get("input"), arguments.get("residual")
    into = modules.get(source) if isinstance(source, fx.Node) else None
    if into is None or _kind(type(into), _DIMS) is None:
        what = "an operation" if into is None else f"{names[into]} ({type(into).__name__})"
        reason = f"its input is from {what}, not from a convolution or Linear"
        if any(user in modules and _kind(type(modules[user]), _DIMS) for user in node.users):
            reason += "; a BatchNorm before a convolution cannot be folded, since padding comes after it"
        return reason
    if sum(module is into for module in modules.values()) > 1:
        return f"{names[into]} is called more than once"
    if set(source.users) != {node}:
        return f"something else reads the output of {names[into]}"
    return _Pair(norm, into, residual is not None)


def _why_not(
    pair: _Pair, site: Site, calls: Calls, names: dict[nn.Module, str], owners: dict[Tensor, set[nn.Module]]
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
    if not weight.is_meta and not all(t.isfinite().all() for t in _folded(into, norm)):
        return f"the folded weight or bias of {name} would leave the range of {weight.dtype}"
    return None


def _out_channels(into: Any) -> int:
    return into.out_features if isinstance(into, nn.Linear) else into.out_channels


def _folded(into: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the folded weight and bias, computed in float64 and rounded once to the dtype of `into`."""
    weight = into.weight.detach()

    def wide(t: Tensor) -> Tensor:
        return t.detach().to(weight.device, torch.float64)

    scale = (wide(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * wide(norm.weight)
    shift = -wide(norm.running_mean) if into.bias is None else wide(into.bias) - wide(norm.running_mean)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + wide(norm.bias)
    if isinstance(into, _TRANSPOSED):  # (in, out / groups, *), the inputs of a group side by side
        grouped = wide(weight).unflatten(0, (into.groups, -1))
        new = (grouped * scale.view(into.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        new = wide(weight) * scale.view(-1, *[1] * (weight.dim() - 1))
    return torch.empty_like(weight).copy_(new), shift.to(weight.dtype)


def _fold_pair(pair: _Pair) -> None:
    """Fold one pair. The two modules stay the same objects, so that whatever refers to them sees the change."""
    into: Any = pair.into
    norm: Any = pair.norm
    trained = into.weight.requires_grad
    weight, bias = _folded(into, norm)
    into.weight, into.bias = nn.Parameter(weight, trained), nn.Parameter(bias, trained)
    rest = _rest_of(pair)
    norm.__class__ = type(rest)
    vars(norm).clear()
    vars(norm).update(vars(rest.eval()))


def _rest_of(pair: _Pair) -> nn.Module:
    """Return what takes the place of a folded BatchNorm."""
    norm: Any = pair.norm
    called = _NORMS_BY_NAME.get(_full_name(class_without_checkpoint_safety(type(norm))))
    if called:
        children = {name: getattr(norm, name) for name in called if hasattr(norm, name)}
        return nn.Sequential(OrderedDict(children))
    epilogue = activation_module(getattr(norm, "activation", None), getattr(norm, "activation_param", None))
    kind = _kind(type(pair.into), _DIMS)
    dims = None if kind is None or _takes_one_number_of_dims(norm) else _DIMS[kind]
    return FoldedBatchNorm(epilogue, dims) if pair.adds or dims is not None else epilogue
