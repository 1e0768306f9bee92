"""A module's forward written again as Python source, with the sites of its graph as calls of fastbn.nn.epilogue.run.

The class that has it is a subclass of the module's own, made once per class and source, so that all blocks of a kind
share one code object. It is pickled as these two.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import keyword
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fastbn.nn import epilogue
from fastbn.nn.scripting import in_place_of
from fastbn.transforms.fuse.patterns import Mode, Site
from fastbn.transforms.fuse.trace import Guard, Refused, Trace, is_constant, source_of

_TEMPLATE = """\
def guard(self):
    try:
        return cls.forward is original and {guard}
    except AttributeError:
        return False

def fused(self, {inputs}, _outer):
{body}

def bind(_guard, _fused, _cls, _Tensor, _NOTHING):
    def forward(self, *args, **kwargs):
        if len(args) == {count} and not kwargs and {checks} and _guard(self):
            return _fused(self, *args, _NOTHING)
        return _cls.forward(self, *args, **kwargs)

    return forward
{tail}"""
_TAIL = """
def _with_epilogue(self, input, epilogue):
    if {check} and guard(self):
        return fused(self, input, epilogue)
    return epilogue.apply(self(input))

def _is_fresh(self):
    return guard(self) and {fresh}
"""


def write(traced: Trace, arguments: dict[fx.Node, tuple[Any, Any]], sites: list[Site], input_type: type) -> str:
    """Return the source. Raises Refused if something in the graph cannot be written."""
    return _Writer(traced, arguments, sites).source(input_type)


class _Writer:
    def __init__(self, traced: Trace, arguments: dict[fx.Node, tuple[Any, Any]], sites: list[Site]) -> None:
        self.traced, self.arguments, self.sites = traced, arguments, sites
        self.imports: dict[str, None] = {}
        self.site_at = {site.chain[-1]: site for site in sites}
        self.inside = {node: site for site in sites for node in site.chain[:-1]}
        self.conditions = {site: f"_ok_{i}" for i, site in enumerate(sites) if site.checks}
        self.names = {node: _identifier(node.name) for node in traced.graph.nodes}
        self.methods: list[str] = []
        self.owners: dict[str, str] = {}  # variables of the guard, by the paths of the modules that they hold

    def source(self, input_type: type) -> str:
        nodes = list(self.traced.graph.nodes)
        inputs = [self.names[node] for node in nodes if node.op == "placeholder"]
        body = self._body(nodes)
        checks = [self._guard(guard) for guard in self.traced.guards]
        text = _TEMPLATE.format(
            guard=" and ".join(checks) or "True",
            inputs=", ".join(inputs),
            body="\n".join("    " + line for line in body),
            count=len(inputs),
            checks=" and ".join(self._is_of(input_type, f"args[{i}]") for i in range(len(inputs))),
            tail=self._tail(self._is_of(input_type, "input")) if len(inputs) == 1 else "",
        )
        described = [
            (
                str(site.node.target),
                site.add is not None,
                next((str(n.target) for n in site.after[-1:] if n.op == "call_module"), ""),
                next((getattr(n.target, "__name__", str(n.target)) for n in site.after[-1:]), ""),
                site.is_tail,
                tuple(str(step.target) for step in site.before),
                tuple(str(step.target) for step in site.after[:-1]),
            )
            for site in self.sites
        ]
        imports = "\n".join(f"import {name}" for name in sorted(self.imports))
        methods = "".join(f"_method_{i} = {method}\n" for i, method in enumerate(self.methods))
        return f"{imports}\n\nsites = {described!r}\n{methods}\n{text}"

    def _is_of(self, input_type: type, name: str) -> str:
        """Return the condition that an input is what forward was traced for."""
        of = "_Tensor" if input_type is torch.Tensor else input_type.__name__
        return f"type({name}) is {of}" if self.traced.asks_type else f"isinstance({name}, {of})"

    def _tail(self, check: str) -> str:
        """Return the methods of a class whose forward returns the result of a site."""
        for site in self.sites:
            if site.is_tail:
                checks = [self._conditions(site)] if site.checks else []
                checks += [f"is_fresh({_path(str(site.node.target))})"]
                checks += [f"is_known({self._step(step)})" for step in (*site.before, *site.after)]
                return _TAIL.format(check=check, fresh=" and ".join(checks))
        return ""

    def _body(self, nodes: list[fx.Node]) -> list[str]:
        last_use: dict[fx.Node, int] = {}
        for i, node in enumerate(nodes):
            for used in self._inputs(node):
                last_use[used] = i
        lines = [f"{name} = {self._conditions(site)}" for site, name in self.conditions.items()]
        for i, node in enumerate(nodes):
            inner, site = self.inside.get(node), self.site_at.get(node)
            chain = inner or site
            condition = self.conditions.get(chain) if chain else None
            if node.op == "placeholder" or (inner and not condition):
                continue
            if node.op == "output":
                result: Any = node.args[0]
                if not (result in self.site_at and self.site_at[result].is_tail):
                    lines.append(f"return {self._text(self.arguments[node][0][0])}")
                continue
            if site is not None and site.is_tail:
                if condition:
                    lines += [f"if not {condition}:", f"    return _outer.apply({self._call(node)})"]
                lines.append(f"return {self._run(site, ', _outer')}")
                continue
            value = self._run(site, "") if site else "None" if inner else self._call(node)
            if condition:
                value = f"{value} if {condition} else {self._call(node)}"
            freed = [self.names[used] for used in last_use if last_use[used] == i and used is not node]
            lines.append(f"{self.names[node]} = {value}" + "".join(f"; {name} = None" for name in freed))
        return lines

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that the statement of a node reads."""
        inner, site = self.inside.get(node), self.site_at.get(node)
        if inner is not None:
            return node.all_input_nodes if inner in self.conditions else []
        if site is None:
            return node.all_input_nodes
        own = node.all_input_nodes if site in self.conditions else []
        residual = [site.residual] if isinstance(site.residual, fx.Node) else []
        return [*own, *site.node.all_input_nodes, *residual]

    def _conditions(self, site: Site) -> str:
        return " and ".join(f"{function}({_path(path)})" for function, path in dict.fromkeys(site.checks))

    def _run(self, site: Site, outer: str) -> str:
        parts = []
        if site.add is not None:
            parts += [f"residual={self.names[site.residual]}", f"add={_ADDITIONS[site.add]}"]
            if _ADDITIONS[site.add].startswith("operator"):
                self.imports["operator"] = None
        for name, steps in (("before", site.before), ("after", site.after)):
            if steps:
                parts.append(f"{name}=({', '.join(self._step(step) for step in steps)},)")
        input = self._text(self.arguments[site.node][0][0])
        return f"run({_path(str(site.node.target))}, {input}, Epilogue({', '.join(parts)}){outer})"

    def _step(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return _path(str(node.target))
        args, kwargs = self.arguments[node]
        target = repr(node.target) if node.op == "call_method" else self._import(node.target)
        return f"Function({target}, {self._text(tuple(args[1:]))}, {self._text(kwargs)})"

    def _call(self, node: fx.Node) -> str:
        args, kwargs = self.arguments[node]
        if node.op == "get_attr":
            return _path(str(node.target))
        if node.op == "call_method":
            called, args = f"{self._text(args[0])}.{node.target}", args[1:]
        else:
            called = _path(str(node.target)) if node.op == "call_module" else self._import(node.target)
        given = [self._text(a) for a in args] + [f"{key}={self._text(value)}" for key, value in kwargs.items()]
        return f"{called}({', '.join(given)})"

    def _text(self, value: Any) -> str:
        """Return an argument as source."""
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, Mode):
            return "self.training" if value.when_training else "(not self.training)"
        if type(value) is tuple:
            return f"({', '.join(map(self._text, value))}{',' * (len(value) == 1)})"
        if type(value) is list:
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) in (dict, fx.immutable_collections.immutable_dict):
            return f"{{{', '.join(f'{key!r}: {self._text(item)}' for key, item in value.items())}}}"
        if type(value) is fx.immutable_collections.immutable_list:
            return self._text(list(value))
        if type(value) is slice:
            return f"slice({', '.join(self._text(v) for v in (value.start, value.stop, value.step))})"
        if value is ...:
            return "..."
        if isinstance(value, torch.dtype):
            return repr(value)
        if is_constant(value):
            return self._import(type(value)) + f".{value.name}" if hasattr(value, "name") else repr(value)
        raise Refused(f"forward passes a {type(value).__name__} to a function")

    def _import(self, value: Any) -> str:
        """Return the name of a function or class, and import its module."""
        source = source_of(value)
        if source is None:
            raise Refused(f"forward calls {getattr(value, '__name__', value)}, which cannot be imported by name")
        module, name = source
        if module == "builtins":
            return name
        self.imports[module] = None
        return f"{module}.{name}"

    def _owner(self, path: str) -> str:
        """Return an expression for a module in the guard, which reads it once: nn.Module.__getattr__ takes 0.3 us."""
        if not path:
            return "self"
        if path in self.owners:
            return self.owners[path]
        parent, _, name = path.rpartition(".")
        module = _attribute(self._owner(parent), name)
        self.owners[path] = f"_owner_{len(self.owners)}"
        return f"({self.owners[path]} := {module})"

    def _guard(self, guard: Guard) -> str:
        path, kind, name, value = guard
        owner = self._owner(path)
        if kind == "eager":
            return "is_eager()"
        if kind == "children":
            return f"tuple({owner}._modules) == {value!r}"
        if kind == "present":
            return f"{owner}.{value}.get({name!r}) is not None"
        if kind == "mode":
            return f"{owner}.training is self.training"
        if kind == "class":
            if source_of(value) is None:
                raise Refused(f"forward may ask for the class {value.__name__}, which cannot be imported by name")
            return f"own_class({owner}) is {self._import(value)}"
        if kind == "function":
            self.imports[_module_of(name)] = None
            self.methods.append(name)
            return f"{name} is _method_{len(self.methods) - 1}"
        if kind == "method":
            self.methods.append(self._import(value) if path else f"cls.{name}")
            own = name.partition(".")[0]
            return f"type({owner}).{name} is _method_{len(self.methods) - 1} and {own!r} not in {owner}.__dict__"
        if kind == "absent":
            return f"not hasattr({owner}, {name!r})"
        attribute = _attribute(owner, name)
        if type(value) is tuple and value and value[0] in (list, dict):
            value = value[0](value[1])
        if callable(value) and not hasattr(value, "name"):
            return f"{attribute} is {self._import(value)}"
        if type(value) in (int, float, str, tuple, list, dict):
            return f"type({attribute}) is {type(value).__name__} and {attribute} == {self._text(value)}"
        return f"{attribute} is {self._text(value)}"


_ADDITIONS = {"add": "operator.add", "iadd": "operator.iadd", "add_to": "add_to", "iadd_to": "iadd_to"}
# What the source calls of fastbn.nn.epilogue.
_NAMES = (
    "Epilogue",
    "Function",
    "NOTHING",
    "add_to",
    "iadd_to",
    "is_eager",
    "is_fresh",
    "is_identity",
    "is_known",
    "keeps_order",
    "own_class",
    "run",
)
_RESERVED = frozenset((*"self args kwargs guard fused original cls sites Tensor _outer".split(), *_NAMES))


def _module_of(name: str) -> str:
    """Return the module in which a full name is found."""
    while name not in sys.modules:
        name = name.rpartition(".")[0]
    return name


def _identifier(name: str) -> str:
    """Return a variable's name that is none of the names that the source uses."""
    taken = (
        name in _RESERVED
        or name in sys.modules
        or keyword.iskeyword(name)
        or name.startswith(("is_", "_ok", "_method"))
    )
    return f"{name}_" if taken else name


def _path(path: str) -> str:
    return functools.reduce(_attribute, path.split(".") if path else (), "self")


def _attribute(owner: str, name: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{owner}.{name}" if plain else f"getattr({owner}, {name!r})"


_classes: dict[tuple[Any, ...], type] = {}
# Classes whose forward is not a source of its own: the name that stands for it, and what makes the class.
MAKERS: dict[str, Callable[[Any], type]] = {}


def class_of(original: Any, source: str) -> type:
    """Return the subclass of `original` whose forward is `source`, or what MAKERS has of that name."""
    key = original, original.forward, source
    if key not in _classes:
        maker = MAKERS.get(source)
        _classes[key] = _make(original, source) if maker is None else maker(original)
    return _classes[key]


def _make(original: type, source: str) -> type:
    forward: Any = original.forward  # type: ignore[attr-defined]
    # No __name__: Dynamo would look for these globals in the module of that name.
    namespace: dict[str, Any] = {
        "cls": original,
        "original": forward,
        "_Tensor": torch.Tensor,
        **{name: getattr(epilogue, name) for name in _NAMES},
    }
    exec(compile(source, f"<fastbn forward of {original.__qualname__}>", "exec"), namespace)
    own = namespace["bind"](namespace["guard"], namespace["fused"], original, torch.Tensor, epilogue.NOTHING)
    body = {
        "forward": own,
        "_fastbn_sites": namespace["sites"],
    }
    takes_epilogue = "_with_epilogue" in namespace
    if takes_epilogue:
        body |= {name: namespace[name] for name in ("_with_epilogue", "_is_fresh")}
    return subclass(original, source, body, takes_epilogue)


def subclass(original: Any, source: str, body: dict[str, Any], takes_epilogue: bool) -> type:
    """Return a subclass of `original` that looks like it, and is pickled as `original` and `source`.

    body: its `forward`, which uses no globals, and more.
    """
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_fastbn_original": original,
        "_fastbn_source": source,
        "_fastbn_digest": _digest(original),
        **body,
        "forward": in_place_of(original.forward, body["forward"]),
    }
    made: Any = type(original)(original.__name__, (original,), body)
    if takes_epilogue and original.__call__ is nn.Module.__call__:
        made._epilogue_owner = made
    return made


def is_generated(cls: type) -> bool:
    return "_fastbn_original" in vars(cls)


def can_be_pickled(cls: Any) -> bool:
    """Return whether instances are pickled as their class and their state, as `_reduce` expects."""
    if hasattr(cls, "__getnewargs__") or hasattr(cls, "__getnewargs_ex__"):
        return False
    return cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__


def _digest(original: Any) -> str:
    """Return a digest of the methods that a source was written from: another release of a library has another."""
    bases = [base for base in original.__mro__ if base not in (nn.Module, object)]
    methods = {name: _describe(value) for base in reversed(bases) for name, value in vars(base).items()}
    return hashlib.sha256(repr(sorted(methods.items())).encode()).hexdigest()


def _describe(value: Any) -> str:
    """Return what a method or its code does, without addresses, lines and orders that change; "" for anything else."""
    if isinstance(value, types.CodeType):
        constants = [_describe(constant) or _of_constant(constant) for constant in value.co_consts]
        return repr((value.co_code, value.co_names, value.co_varnames, constants))
    if isinstance(value, property):
        value = value.fget
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return "" if code is None else _describe(code)


def _of_constant(value: Any) -> str:
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    cls: Any = type(self)
    reduced: Any = object.__reduce_ex__(self, max(2, int(protocol)))
    assert reduced[0] is copyreg.__newobj__  # type: ignore[attr-defined]
    original = cls._fastbn_original
    return (_rebuild, (original, cls._fastbn_source, cls._fastbn_digest), *reduced[2:])


def _rebuild(original: Any, source: str, digest: str) -> Any:
    cls: Any = class_of(original, source) if digest == _digest(original) else original
    return cls.__new__(cls)
