"""fastbn.fold: the BatchNorms of a model in evaluation become part of the convolution or Linear before them.

    conv(x, W) + b  ->  conv(x, W * s) + (b - running_mean) * s + bias,   s = weight / sqrt(running_var + eps)

A BatchNorm before a convolution is left: with padding, the zeros around a normalised image are other numbers before
the normalisation, so no bias stands for them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbn.nn.folded import FoldedBatchNorm, activation_module
from fastbn.transforms.checkpoint import class_without_checkpoint_safety
from fastbn.transforms.module import Model, require_module
from fastbn.transforms.pairs import DIMS, NORMS_BY_NAME, Pair, find_pairs, full_name, kind_of, takes_one_number_of_dims

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


def fold(model: Model, *, inplace: bool = False, verbose: bool = False) -> Model:
    """Return a copy of `model` for inference, in which BatchNorms are folded into the layer before them.

    Conv1d, 2d, 3d, ConvTranspose1d, 2d, 3d and Linear take up torch.nn's and fastbn's BatchNorms, SyncBatchNorm,
    BatchRenorms, GhostBatchNorms and FrozenBatchNorms, the frozen ones of torchvision and detectron2, and timm's
    BatchNormAct2d. New weights are computed in float64 and rounded once to the layer's dtype; a layer without bias gets
    one. The BatchNorm becomes an nn.Identity, or the module of its activation, so that the names and indices of all
    other modules stay.

    A pair is folded if the forward of the module that calls both, traced by torch.fx part by part, gives the layer's
    output to the BatchNorm and to nothing else, and calls each once, whatever values its flags have. Layers with hooks,
    with tied or parametrised weights, or of subclasses with a forward of their own are left, and so are BatchNorms
    without running statistics or before a convolution. Forwards that cannot be traced are taken to call their children
    only as they are, unless their source says otherwise. `fastbn.transforms.fold.examine` returns what is folded and
    why the rest is left; verbose: print it.

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


def _find(model: nn.Module) -> tuple[list[Pair], FoldReport]:
    """Return the pairs to fold, and the report on all BatchNorms."""
    names = {module: name or "(the model itself)" for name, module in model.named_modules()}
    pairs, folded, left = [], [], []
    for norm, found in find_pairs(model):
        if isinstance(found, Pair) and not _is_in_range(found):
            found = f"the folded weight or bias of {names[found.into]} would leave the range of its dtype"
        if isinstance(found, str):
            left.append(Left(names[norm], found))
        else:
            pairs.append(found)
            folded.append(Folded(names[norm], names[found.into]))
    return pairs, FoldReport(tuple(folded), tuple(left))


def _is_in_range(pair: Pair) -> bool:
    """Return whether the folded numbers are finite."""
    return all(t.is_meta or bool(t.isfinite().all()) for t in _folded(pair.into, pair.norm))


def _folded(into: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the folded weight and bias, computed in float64 and rounded once to the dtype of `into`."""
    weight = into.weight.detach()

    def wide(t: Tensor) -> Tensor:
        return t.detach().to(weight.device, torch.float64)

    scale = (wide(norm.running_var) + vars(norm)["eps"]).rsqrt()
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


def _fold_pair(pair: Pair) -> None:
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


def _rest_of(pair: Pair) -> nn.Module:
    """Return what takes the place of a folded BatchNorm."""
    norm: Any = pair.norm
    called = NORMS_BY_NAME.get(full_name(class_without_checkpoint_safety(type(norm))))
    if called:
        children = {name: getattr(norm, name) for name in called if hasattr(norm, name)}
        return nn.Sequential(OrderedDict(children))
    epilogue = activation_module(getattr(norm, "activation", None), getattr(norm, "activation_param", None))
    kind = kind_of(type(pair.into), DIMS)
    dims = None if kind is None or takes_one_number_of_dims(norm) else DIMS[kind]
    return FoldedBatchNorm(epilogue, dims) if pair.adds or dims is not None else epilogue
