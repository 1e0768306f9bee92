"""Which module is called where: a graph of each module's own forward, its children being leaves, from the root down.

Graphs are torch.fx's: one for the defaults of the arguments, and one for each way in which branches may go that depend
on arguments with defaults, such as flags. Where a forward cannot be traced, its children are taken to be called as they
are, except those that its source reaches into (`_reach`).
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_MAX_WAYS = 64  # of branches in one forward
_WALKS = frozenset(("children", "named_children", "modules", "named_modules", "_modules", "get_submodule"))


@dataclass
class Site:
    """The calls in one module's forward: a graph for each way in which it was traced."""

    owner: nn.Module
    graphs: list[fx.Graph]


@dataclass
class Calls:
    """The traced forwards of a model, and what is known of the others.

    callers: the sites that call a module. read: modules whose tensors or attributes a forward takes without calling
    them. opened: modules whose children something else may call, with the name of what does. reached: names of
    attributes that an untraceable forward takes from what is not itself.
    """

    sites: dict[nn.Module, Site] = field(default_factory=dict)
    callers: dict[nn.Module, list[Site]] = field(default_factory=dict)
    read: set[nn.Module] = field(default_factory=set)
    opened: dict[nn.Module, str] = field(default_factory=dict)
    reached: dict[str, str] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    """Follows branches on arguments with defaults as `decisions` says, which grows by those that it does not have."""

    proxy_buffer_attributes = True  # so that a forward that changes a buffer changes none here

    def __init__(self, defaults: Iterable[str] = (), decisions: list[bool] | None = None) -> None:
        super().__init__()
        self.defaults, self.decisions = frozenset(defaults), [] if decisions is None else decisions
        self._decided = 0

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not self._is_of_defaults(obj.node):
            return super().to_bool(obj)  # which raises
        if self._decided == len(self.decisions):
            self.decisions.append(True)
        self._decided += 1
        return self.decisions[self._decided - 1]

    def _is_of_defaults(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node.target in self.defaults
        return node.op.startswith("call_f") and all(map(self._is_of_defaults, node.all_input_nodes))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_calls(model: nn.Module) -> Calls:
    """Return the calls in `model`, which must be in evaluation mode, since a forward may depend on it."""
    calls = Calls()
    _visit(model, {module: name for name, module in model.named_modules()}, calls)
    return calls


def _visit(module: nn.Module, names: dict[nn.Module, str], calls: Calls) -> None:
    if module in calls.sites or not any(True for _ in module.children()):
        return
    site = calls.sites[module] = Site(module, _graphs(module))
    called: dict[nn.Module, None] = {}
    for graph in site.graphs:
        for node in graph.nodes:
            if node.op == "call_module":
                called[module.get_submodule(node.target)] = None
            elif node.op == "get_attr" and "." in node.target:
                calls.read.add(module.get_submodule(node.target.rpartition(".")[0]))
    for child in called:
        calls.callers.setdefault(child, []).append(site)
    if not site.graphs:
        name = names[module] or "the model itself"
        opened, reached = _reach(module)
        calls.opened |= {child: name for child in opened}
        calls.reached |= dict.fromkeys(reached, name)
        called = dict.fromkeys(_with_contents(module.children()))
    for child in called:
        _visit(child, names, calls)


def _with_contents(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield modules, and for containers without a forward what they hold."""
    for module in modules:
        if isinstance(module, _CONTAINERS):
            yield from _with_contents(module.children())
        else:
            yield module


def _graphs(module: nn.Module) -> list[fx.Graph]:
    """Return the graphs of a module's forward, none where it cannot be traced."""
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return []
    parameters = inspect.signature(type(module).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    graphs: list[fx.Graph] = []
    before = {name: copy.copy(value) if type(value) is dict else value for name, value in vars(module).items()}

    def trace(tracer: _Tracer, concrete: dict[str, Any] | None) -> None:
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                graphs.append(tracer.trace(module, concrete))
        except (Exception, SystemExit):  # whatever a forward raises for arguments that have no values
            pass
        finally:  # a forward may assign to attributes
            vars(module).clear()
            vars(module).update(before)

    if defaults:
        trace(_Tracer(), defaults)
    decisions: list[bool] = []
    for _ in range(_MAX_WAYS):
        trace(_Tracer(defaults, decisions), None)
        while decisions and not decisions[-1]:
            decisions.pop()
        if not decisions:
            break
        decisions[-1] = False
    return graphs


def _reach(module: nn.Module) -> tuple[list[nn.Module], set[str]]:
    """Return what an untraceable forward may reach into, by its source: (children, names of others' attributes).

    A child that is only called, as `self.child(...)`, is not reached into, and neither is a list of children, unless a
    loop over it contains another one over its elements.
    """
    if type(module).__module__.startswith("torch."):  # wrappers, which call what they wrap
        return [], set()
    everything = list(_with_contents(module.children()))
    functions = _functions(module)
    nodes = [node for function in functions for node in ast.walk(function)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    callees = {node.func for node in nodes if isinstance(node, ast.Call)}
    values = {node.value for node in attributes}
    foreign = {node.attr for node in attributes if not _is_self(node.value)}
    hands_itself_on = any(_is_self(node) and node not in values for node in nodes)  # for x in self, getattr(self, x)
    if not functions or hands_itself_on or any(node.attr in _WALKS for node in attributes):
        return everything, foreign
    own = {node.attr for node in attributes if _is_self(node.value) and node not in callees}
    opened: list[nn.Module] = []
    for name, child in module.named_children():
        if name in own and not isinstance(child, _CONTAINERS):
            opened.append(child)
        elif name in own and _has_nested_loop(nodes):
            opened += _with_contents([child])
    return opened, foreign


def _functions(module: nn.Module) -> list[Any]:
    """Return the syntax trees of a module's forward and of the methods that it may use; none where they are unknown."""
    methods: dict[str, list[Any]] = {}
    try:
        for cls in type(module).__mro__:
            if cls is not object and not cls.__module__.startswith("torch."):
                tree: Any = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
                for node in tree.body:
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        methods.setdefault(node.name, []).append(node)
    except (OSError, TypeError, SyntaxError):  # there is no source
        return []
    forwards = methods.get("forward", ())
    if "forward" in vars(module) or any([a.arg for a in f.args.args[:1]] != ["self"] for f in forwards):
        return []
    found: list[Any] = []
    names = ["forward", "__call__"]
    for name in names:  # which grows
        for function in methods.pop(name, ()):
            found.append(function)
            names += [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _has_nested_loop(nodes: list[ast.AST]) -> bool:
    """Return whether something loops over, or indexes, the variable of a loop: the layers of a stage of a list."""
    loops = [node for node in nodes if isinstance(node, (ast.For, ast.comprehension))]
    variables = {name.id for loop in loops for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
    walked: list[ast.AST] = [loop.iter for loop in loops]
    walked += [node.value for node in nodes if isinstance(node, ast.Subscript)]
    return any(isinstance(name, ast.Name) and name.id in variables for tree in walked for name in ast.walk(tree))
