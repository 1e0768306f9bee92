"""Normalisations in a graph that are followed by an addition, an activation or both, and whether one op may do all.

The op runs where the last node of the chain stood. Moving a normalisation there is allowed where nothing between can
tell: there is nothing, or no other can read or write what the normalisation reads.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fastbn.nn import epilogue, torch_activations
from fastbn.transforms.fuse.trace import Refused, Trace


@dataclass
class Mode:
    """An argument that is `self.training`, or its negation."""

    when_training: bool


@dataclass(eq=False)
class Site:
    """A chain of nodes that becomes one call.

    checks: (function of fastbn.nn.epilogue, path of a module), true at a call, or else the chain runs as it was.
    """

    node: fx.Node
    before: list[fx.Node] = field(default_factory=list)
    add: str | None = None  # the function of fastbn.nn.epilogue or operator that adds
    add_node: fx.Node | None = None
    residual: Any = None
    after: list[fx.Node] = field(default_factory=list)
    checks: list[tuple[str, str]] = field(default_factory=list)
    is_tail: bool = False  # its result is what forward returns

    @property
    def chain(self) -> list[fx.Node]:
        return [self.node, *self.before, *([self.add_node] if self.add_node else []), *self.after]

    @property
    def fuses(self) -> bool:
        return self.add is not None or bool(self.after)


def merge(training: Trace, evaluation: Trace) -> dict[fx.Node, tuple[Any, Any]]:
    """Return the arguments of every node for both modes. Raises Refused if the modes differ in more than arguments."""
    nodes, others = list(training.graph.nodes), list(evaluation.graph.nodes)
    refused = Refused("forward differs between training and evaluation")
    if len(nodes) != len(others):
        raise refused
    twin = dict(zip(others, nodes, strict=True))

    def both(a: Any, b: Any) -> Any:
        if isinstance(b, fx.Node):
            b = twin[b]
        if type(a) is not type(b):
            raise refused
        if isinstance(a, (tuple, list)):
            if len(a) != len(b):
                raise refused
            return type(a)([both(*pair) for pair in zip(a, b, strict=True)])
        if isinstance(a, dict):
            if list(a) != list(b):
                raise refused
            return {key: both(value, b[key]) for key, value in a.items()}
        if isinstance(a, slice):
            return slice(both(a.start, b.start), both(a.stop, b.stop), both(a.step, b.step))
        if isinstance(a, bool) and a is not b:
            return Mode(a)
        if a is not b and a != b:
            raise refused
        return a

    merged = {}
    for a, b in zip(nodes, others, strict=True):
        if a.op != b.op or a.target != b.target:
            raise refused
        merged[a] = both(a.args, b.args), both(a.kwargs, b.kwargs)
    return merged


def find(graph: fx.Graph, module: nn.Module) -> list[Site]:
    """Return the sites of a graph in their order: normalisations, or children that end in one, and what follows."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    sites = []
    # Of two that are added, the later one takes the addition: it need not be moved.
    for node in reversed(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        if not epilogue.takes_epilogue(module.get_submodule(str(node.target))):
            continue
        site = _follow(node, module, taken)
        site.is_tail = site.is_tail and not _is_followed(site, position)
        if site.fuses and not _may_move(site, module, position):
            continue
        if site.fuses or site.is_tail:
            taken.update(site.chain[1:])
            sites.append(site)
    return sites[::-1]


def _follow(node: fx.Node, module: nn.Module, taken: set[fx.Node]) -> Site:
    """Return the longest chain after `node` in which each value is read once, by the next node."""
    site, last = Site(node), node
    identities: list[fx.Node] = []
    while True:
        user = _only_user(last)
        if user is None or user in taken:
            break
        if user.op == "output":
            site.is_tail = user.args[0] is last
            if site.is_tail:
                (site.after if site.add else site.before).extend(identities)
            break
        if _is_step(user, module, epilogue.IDENTITIES):
            identities.append(user)
        elif (added := _addition(user, last)) is not None and site.add is None:
            site.add, site.residual = added
            site.add_node, site.before, identities = user, identities, []
        elif _is_activation(user, module):
            site.after, identities = [*identities, user], []
            if _only_user(user) is not None and _only_user(user).op == "output":  # type: ignore[union-attr]
                site.is_tail = _only_user(user).args[0] is user  # type: ignore[union-attr]
            break
        else:
            break
        last = user
    return site


def _is_followed(site: Site, position: dict[fx.Node, int]) -> bool:
    """Return whether forward still does something after the site, to a buffer for example."""
    end = position[site.chain[-1]]
    return any(i > end and node.op not in ("output", "get_attr") for node, i in position.items())


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the node that reads `node`, once and it alone."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    uses = 0

    def count(used: fx.Node) -> fx.Node:
        nonlocal uses
        uses += used is node
        return used

    fx.node.map_arg((user.args, user.kwargs), count)
    return user if uses == 1 else None


def _is_step(node: fx.Node, module: nn.Module, table: dict[type, Any]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return type(module.get_submodule(str(node.target))) in table


def _is_activation(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return _is_step(node, module, torch_activations.ACTIVATIONS)
    table: Any = {"call_function": torch_activations.FUNCTIONS, "call_method": torch_activations.METHODS}.get(
        node.op, {}
    )
    if node.target not in table or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    try:
        return table[node.target](*node.args[1:], **node.kwargs) is not None
    except TypeError:
        return False


def _addition(node: fx.Node, value: fx.Node) -> tuple[str, fx.Node] | None:
    """Return the function that adds a residual to `value` as `node` does, and the residual."""
    operands = list(node.args)
    if "other" in node.kwargs:
        operands.append(node.kwargs["other"])
    options = {key: value for key, value in node.kwargs.items() if key != "other"}
    if len(operands) != 2 or options not in ({}, {"alpha": 1}):
        return None
    if node.target in (operator.add, torch.add, "add"):
        name = "add"
    elif node.target in (operator.iadd, "add_"):
        name = "iadd"
    else:
        return None
    first, second = operands
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return (name, second) if first is value else (f"{name}_to", first)


def _may_move(site: Site, module: nn.Module, position: dict[fx.Node, int]) -> bool:
    """Return whether the site may run where its chain ends, with what has to be asked at each call in `checks`."""
    node, chain = site.node, set(site.chain)
    between = [
        other
        for other, i in position.items()
        if position[node] < i < position[site.chain[-1]] and other not in chain and other.op != "get_attr"
    ]
    source = _fresh(node.args[0], module) if between and _is_normalization(node, module) else None
    if source is not None:
        bn = module.get_submodule(str(node.target))
        if any(_reads(other, bn, module) for other in position):
            return False
        for other in between:
            if other.op == "call_module" and bn in module.get_submodule(str(other.target)).modules():
                return False
        site.checks.append(("keeps_order", str(node.target)))
        site.checks += [("is_fresh", path) for path in source]
        site.checks += [("is_identity", str(step.target)) for step in site.before]
    else:
        for other in between:
            if not _is_step(other, module, epilogue.IDENTITIES):
                return False
            site.checks.append(("is_identity", str(other.target)))
    if isinstance(site.residual, fx.Node) and any(
        _is_in_place(other, module) for other in site.residual.users if position[other] > position[site.chain[-1]]
    ):
        return False  # backward may need it
    if site.add == "iadd_to":  # the fused op leaves the residual as it is
        paths = _fresh(site.residual, module)
        if paths is None:
            return False
        site.checks += [("is_fresh", path) for path in paths]
    return True


def _is_normalization(node: Any, module: nn.Module) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), epilogue.NormalizationLayer)


def _is_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Return whether a node changes its input, going by its name and options."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or name in _IN_PLACE or bool(node.kwargs.get("inplace"))


_IN_PLACE = frozenset("iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split())


def _reads(node: fx.Node, bn: nn.Module, module: nn.Module) -> bool:
    """Return whether a node takes a tensor of the normalisation `bn`, running statistics for example."""
    return node.op == "get_attr" and module.get_submodule(str(node.target).rpartition(".")[0]) is bn


def _fresh(node: Any, module: nn.Module) -> list[str] | None:
    """Return the modules that have to be fresh for only the reader of a node's value to see it; None if others may."""
    if _only_user(node) is None:
        return None
    if node.op == "call_module":
        return [str(node.target)] if epilogue.is_fresh(module.get_submodule(str(node.target))) else None
    if "out" in node.kwargs:
        return None
    if node.target in _NEW or (node.op == "call_method" and node.target in ("add", "mul", "sub")):
        return []
    if node.target in (operator.iadd, "add_") and isinstance(node.args[0], fx.Node):
        return _fresh(node.args[0], module)
    return None


# Functions whose result is a new tensor.
_NEW = (operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.sub, torch.cat)
