"""Checks of what is called before and after a layer: in the graphs that torch.fx makes of a model's forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn

from fastbn.inspect.doctor.faults import Finding, finding
from fastbn.inspect.doctor.layers import is_frozen, is_norm, setting, uses_batch
from fastbn.nn.torch_activations import ACTIVATIONS, FUNCTIONS, METHODS
from fastbn.transforms.calls import Calls, Site, find_calls
from fastbn.transforms.pairs import DIMS, kind_of

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


class _Call(NamedTuple):
    """A call of a module in one graph of a forward."""

    site: Site
    graph: fx.Graph
    node: fx.Node

    def module_of(self, node: object) -> nn.Module | None:
        """Return the module that a node of the graph calls, None for other nodes."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.site.owner.get_submodule(str(node.target))

    @property
    def source(self) -> fx.Node | None:
        """The node whose value is the module's input."""
        first = next(iter([*self.node.args, *self.node.kwargs.values()]), None)
        return first if isinstance(first, fx.Node) else None


def check_order(twin: nn.Module) -> tuple[list[Finding], list[str]]:
    """Return what is wrong with the order of calls in a copy of a model, and the BatchNorms whose calls nobody saw."""
    names = {module: name for name, module in twin.named_modules()}
    norms = [module for module in names if is_norm(module)]
    calls = find_calls(twin) if norms else Calls()
    sites = {module: list(_calls_of(module, calls)) for module in names if module in calls.callers}
    called = {norm: sites[norm] for norm in norms if norm in sites}
    findings = [*_biases(twin, names, calls, sites), *_activations(names, called), *_neighbours(names, calls, called)]
    return findings, [names[norm] for norm in norms if norm not in called and norm is not twin]


def _neighbours(names: dict[nn.Module, str], calls: Calls, called: dict[nn.Module, list[_Call]]) -> Iterator[Finding]:
    """Yield the layers that come after a dropout, and those that are called in several places."""
    for norm, its_calls in called.items():
        if any(_is_dropout(call, call.source) for call in its_calls):
            yield finding("dropout-before-norm", names[norm], "its input is that of a dropout")
        times = max(sum(_same_graph(a, b) for b in its_calls) for a in its_calls)
        owners = len(calls.callers[norm])
        if (times > 1 or owners > 1) and not is_frozen(norm):
            where = f"called {times} times in one forward" if times > 1 else f"called by {owners} modules"
            yield finding("shared-layer", names[norm], f"the layer is {where}")


def _calls_of(module: nn.Module, calls: Calls) -> Iterator[_Call]:
    for site in calls.callers[module]:
        for graph in site.graphs:
            for node in graph.nodes:
                call = _Call(site, graph, node)
                if call.module_of(node) is module:
                    yield call


def _same_graph(a: _Call, b: _Call) -> bool:
    return a.graph is b.graph


def _biases(
    twin: nn.Module, names: dict[nn.Module, str], calls: Calls, sites: dict[nn.Module, list[_Call]]
) -> Iterator[Finding]:
    """Yield the convolutions and Linears whose bias every reader of their output subtracts with the mean."""
    for module, its_calls in sites.items():
        if kind_of(type(module), DIMS) is None or getattr(module, "bias", None) is None:
            continue
        if module in calls.read or names[module].rpartition(".")[2] in calls.reached:
            continue  # a forward may use it otherwise
        if any(call.site.owner in calls.opened for call in its_calls):
            continue  # a forward that cannot be traced may call it by itself
        readers = [call.module_of(user) for call in its_calls for user in call.node.users]
        if readers and all(_subtracts_mean(reader, module, twin.training) for reader in readers):
            after = ", ".join(sorted({names[reader] for reader in readers if reader is not None}))
            yield finding("bias-before-norm", names[module], f"its bias is subtracted again by {after}")


def _subtracts_mean(reader: Any, source: Any, is_training: bool) -> bool:
    """Return whether a module removes what `source` adds to each channel, in training."""
    if reader is None or not is_norm(reader) or is_frozen(reader) or (is_training and not uses_batch(reader)):
        return False
    features = source.out_features if isinstance(source, nn.Linear) else source.out_channels
    return bool(setting(reader, "num_features") == features)


def _activations(names: dict[nn.Module, str], called: dict[Any, list[_Call]]) -> Iterator[Finding]:
    """Yield the layers that come after an activation in a model whose layers mostly come before one."""
    before, after = [], []
    for norm, its_calls in called.items():
        is_after = all(
            _is_activation(call, call.source) and len(getattr(call.source, "users", ())) == 1 for call in its_calls
        )
        if is_after:
            after.append(norm)
        elif _has_activation(norm) or all(
            any(_is_activation(call, user) for user in call.node.users) for call in its_calls
        ):
            before.append(norm)
    if len(before) > len(after):
        for norm in after:
            yield finding("activation-before-norm", names[norm], "its input is that of an activation")


def _has_activation(norm: Any) -> bool:
    """Return whether a layer ends in an activation of its own."""
    if getattr(norm, "activation", None) is not None:
        return True
    return isinstance(getattr(norm, "act", None), nn.Module) and not isinstance(norm.act, nn.Identity)


def _is_activation(call: _Call, node: fx.Node | None) -> bool:
    if node is None:
        return False
    if node.op == "call_module":
        return type(call.module_of(node)) in ACTIVATIONS
    return node.target in (FUNCTIONS if node.op == "call_function" else METHODS if node.op == "call_method" else ())


def _is_dropout(call: _Call, node: fx.Node | None) -> bool:
    module: Any = call.module_of(node)
    if module is not None:
        return bool(isinstance(module, _DROPOUTS) and module.p)
    if node is None or node.op != "call_function" or node.target not in _DROPOUT_FUNCTIONS:
        return False
    options: dict[str, Any] = dict(zip(("input", "p", "training"), node.args)) | node.kwargs
    return bool(options.get("p", 0.5)) and options.get("training", True) is not False
