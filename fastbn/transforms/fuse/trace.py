"""The graph of one module's forward, its children leaves, and everything that Python decided while it was traced.

Symbolic tracing keeps what Python decided: branches, loops, attributes. Here each attribute that forward reads, of the
module or of a child, becomes a guard, to be asked at each call; where a decision cannot be guarded, the trace is
refused. The module itself is not touched: forward runs on a twin that shares its children and tensors.
"""

from __future__ import annotations

import abc
import collections
import dis
import enum
import functools
import inspect
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from fastbn import _torch
from fastbn.nn.activation import WithActivation
from fastbn.nn.epilogue import own_class
from fastbn.transforms.fuse.watch import CONTAINERS, PLAIN_CONTAINERS, call, is_in, watched_calls

# The path of a module ("" for the traced one), the kind, a name, a value. Kinds: "attribute", which has the value;
# "absent", which the module does not have; "present", a module, parameter or buffer that is not None, the value being
# the dictionary it is in; "children", whose names are the value; "mode", which is that of the traced module; "method",
# whose function is the value; "class", the module's own. Of no module: "function", which has that full name; "eager",
# that torch does not record what is called.
Guard = tuple[str, str, str, Any]


class Refused(Exception):
    """Why forward cannot be traced, or not without a guess."""


@dataclass
class Trace:
    """The graph of a forward, and the guards under which it holds. `names` are those of its inputs.

    asks_type: whether forward asks for the type of an input: then the graph does not hold for subclasses of it.
    """

    graph: fx.Graph
    names: list[str]
    guards: dict[Guard, None]
    asks_type: bool


def trace(module: nn.Module, training: bool, input_type: type) -> Trace:
    """Return the graph of `module`'s forward, of inputs of `input_type` for the parameters that have no default.

    training: what `training` reads as, of the module and its children. Raises Refused with the reason.
    """
    forward: Any = type(module).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        raise Refused(f"forward is a {type(forward).__name__}") from None
    names = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if not names or any(p.default is p.empty and p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise Refused("forward takes *args or **kwargs, or no input")
    if not all(p.default is p.empty or is_constant(p.default) or callable(p.default) for p in parameters):
        raise Refused("a default of forward may change")
    tracer = _Tracer(training)
    twin = tracer.watched(module, "")
    inputs = []
    for name in names:
        proxy = _Proxy(tracer.create_node("placeholder", name, (), {}), tracer)
        proxy.answers = input_type
        inputs.append(proxy)
    with torch.random.fork_rng(devices=[]), watched_calls(tracer):
        try:
            result = call(_with_leaves(forward, tracer), twin, inputs)
        except (Exception, SystemExit) as error:
            text = str(error).strip().splitlines()
            raise Refused(tracer.refused or f"{type(error).__name__}: {text[0] if text else ''}"[:120]) from None
    if tracer.asks_class:
        tracer.guard_classes()
    if any(copy != original for copy, original in tracer.copies.values()):
        raise Refused("forward changes an attribute in place")
    if tracer.refused is not None:  # forward may have caught the exception
        raise Refused(tracer.refused)
    try:
        tracer.graph.output(tracer.create_arg(result))
    except Exception as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"forward returns a {type(result).__name__}") from None
    return Trace(tracer.graph, names, tracer.guards, tracer.asks_type)


def _with_leaves(forward: Any, tracer: _Tracer) -> Any:
    """Return `forward` with those functions of LEAF_FUNCTIONS replaced that it names: their calls become nodes."""

    def leaf(function: Any) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            given = fx.node.map_aggregate((args, kwargs), tracer.as_value)
            return tracer.create_proxy("call_function", function, *given)

        return record

    if not isinstance(forward, types.FunctionType):
        return forward
    leaves = {}
    for name in forward.__code__.co_names:
        value = forward.__globals__.get(name)
        if isinstance(value, types.FunctionType) and f"{value.__module__}.{value.__qualname__}" in LEAF_FUNCTIONS:
            leaves[name] = leaf(value)
    if not leaves:
        return forward
    scope = {**forward.__globals__, **leaves}
    return types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)


# The "module.qualified name" of functions that are called as they are, whatever they do with the input's shape.
LEAF_FUNCTIONS: set[str] = set()


class _Tracer(TracerBase):
    """Records calls of modules and functions as nodes, attributes that forward read as guards."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.scope = fx.proxy.Scope("", None)
        self.module_stack: Any = {}
        self.node_name_to_scope: Any = {}
        self.training = training
        self.guards: dict[Guard, None] = {}
        self.refused: str | None = None
        self.copies: dict[tuple[str, str], tuple[Any, Any]] = {}  # of lists and dictionaries, and what they are of
        self.is_paused = False
        self.asks_type = False
        self.asks_class = False  # whether forward calls isinstance, perhaps of a module
        self._twins: dict[str, Any] = {}
        self._classes: dict[str, type] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block, do not watch what is called."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def refuse(self, reason: str) -> Refused:
        self.refused = self.refused or reason
        return Refused(reason)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (_Watched, _Attributes, Tensor)) and not isinstance(a, fx.Proxy):
            raise self.refuse(f"a {type(a).__name__} is passed to a function")
        if type(a) is collections.OrderedDict:
            return self.create_proxy("call_function", collections.OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, (tuple, list, dict)) and type(a) not in PLAIN_CONTAINERS:  # which would become plain ones
            raise self.refuse(f"forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def as_value(self, a: Any) -> Any:
        """Return the proxy of a module that is passed to a leaf, and anything else as it is."""
        return self.create_proxy("get_attr", a._watch[1], (), {}) if isinstance(a, _Watched) else a

    def watched(self, module: nn.Module, path: str) -> Any:
        """Return the twin of the module at `path`, whose class watches what is read and written."""
        if path not in self._twins:
            cls = type(module)
            if cls.__getattr__ is not nn.Module.__getattr__ or isinstance(module, torch.jit.ScriptModule):
                raise self.refuse(f"{cls.__name__} has attributes of its own kind")
            if not may_be_subclassed(cls):
                raise self.refuse(f"{cls.__name__} would notice that it has a subclass")
            metaclass = type(cls)
            twin_class = metaclass.__new__(metaclass, cls.__name__, (_Watched, cls), {"_watch": (self, path)})
            twin = object.__new__(twin_class)
            object.__setattr__(twin, "__dict__", dict(module.__dict__))
            self._twins[path], self._classes[path] = twin, own_class(module)
        return self._twins[path]

    def guard_method(self, path: str, name: str, value: Any) -> None:
        """Guard a method or another function that the class of a module has, unless the class is torch's."""
        owner = next(base for base in self._classes[path].__mro__ if name in vars(base))
        if isinstance(value, types.MethodType) and isinstance(value.__self__, type):
            name = f"{name}.__func__"
        if not is_in(owner.__module__, ("torch",)):
            self.guards[path, "method", name, getattr(value, "__func__", value)] = None

    def guard_functions(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        """Guard the functions that code takes from its module."""
        module = str(scope.get("__name__"))
        for name in code.co_names:
            value = scope.get(name)
            if isinstance(value, types.FunctionType) and getattr(sys.modules.get(module), name, None) is value:
                self.guards["", "function", f"{module}.{name}", value] = None

    def guard_base(self, code: types.CodeType, variables: dict[str, Any]) -> None:
        """Guard a method that is called by super()."""
        first = variables.get(code.co_varnames[0]) if code.co_argcount else None
        if not issubclass(type(first), _Watched):
            return
        path = object.__getattribute__(first, "_watch")[1]
        owners = [base for base in self._classes[path].__mro__ if code.co_name in vars(base)]
        for base in owners[1:]:
            function = vars(base)[code.co_name]
            if getattr(function, "__code__", None) is code:
                source = source_of(base)
                if source is None:
                    raise self.refuse(f"forward calls a method of {base.__name__}, which cannot be imported by name")
                self.guards["", "function", f"{'.'.join(source)}.{code.co_name}", function] = None

    def guard_classes(self) -> None:
        """Guard the classes of all modules that forward has read."""
        for path in self._twins:
            if path:
                self.guards[path, "class", "", self._classes[path]] = None


def may_be_subclassed(cls: type) -> bool:
    """Return whether no code of the user's class runs when a subclass is made, to register it for example."""
    hook, ours = (getattr(each.__init_subclass__, "__func__", None) for each in (cls, WithActivation))
    return type(cls) in (type, abc.ABCMeta) and hook in (None, ours) and not _takes_own_class_for_granted(cls)


def _takes_own_class_for_granted(cls: type) -> bool:
    """Return whether a method says super(type(self), self), which in a subclass calls itself for ever."""
    for base in cls.__mro__:
        if base is not object and base.__module__.partition(".")[0] != "torch":
            for value in vars(base).values():
                code = getattr(value, "__code__", None)
                if code is not None and "super" in code.co_names and _calls_super_of_own_class(code):
                    return True
    return False


def _calls_super_of_own_class(code: types.CodeType) -> bool:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("PRECALL", "CACHE", "PUSH_NULL")]
    for i, instruction in enumerate(instructions):
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval == "super":
            first, *others = [following.argval for following in instructions[i + 1 : i + 3]]
            if first == "type" or "__class__" in others:
                return True
    return False


class _Proxy(fx.Proxy):
    """A value of the graph. Inputs say that they are what they will be; of others forward must not ask the type."""

    answers: type | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "answers"):
            raise self.tracer.refuse(f"forward sets {name} of a tensor")  # type: ignore[attr-defined]
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if is_in(asking, ("fastbn", *_torch.WHO_SORTS_PROXIES)):
            return _Proxy
        if self.answers is None:
            tracer: Any = self.tracer
            raise tracer.refuse("forward asks for the type of an intermediate value")
        self.tracer.asks_type = True  # type: ignore[attr-defined]
        return self.answers


def _record_in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# fx.Proxy has none of these, so that `y += x` would be recorded as `y = y + x`.
for _name in "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split():
    setattr(_Proxy, f"__{_name}__", _record_in_place(_name))


_MODULE_TENSORS = ("_parameters", "_buffers")


class _Watched:
    """Mixin of a twin's class. What it does for its own sake goes past `__getattribute__` of the twin."""

    _watch: tuple[_Tracer, str]

    def __getattribute__(self, name: str) -> Any:
        if name in ("_watch", "__class__"):
            return object.__getattribute__(self, name)
        tracer, path = object.__getattribute__(self, "_watch")
        if name == "training":
            if path:
                tracer.guards[path, "mode", "", None] = None
            return tracer.training
        if name == "__dict__" or name in _MODULE_TENSORS:
            raise tracer.refuse(f"forward reads {name}")
        value = super().__getattribute__(name)
        if name == "_modules":
            tracer.guards[path, "children", "", tuple(value)] = None
            prefix = f"{path}." if path else ""
            return types.MappingProxyType(
                {key: None if child is None else tracer.watched(child, prefix + key) for key, child in value.items()}
            )
        kind = type(value)  # isinstance would run what an object has for __class__
        if kind is types.MethodType:
            if value.__self__ is self or isinstance(value.__self__, type):
                tracer.guard_method(path, name, value)
                return value
        elif is_constant(value):
            tracer.guards[path, "attribute", name, value] = None
            return value
        elif kind in (list, dict) and is_constant(tuple(value)):
            items = tuple(value.items()) if kind is dict else tuple(value)
            if is_constant(items):
                tracer.guards[path, "attribute", name, (kind, items)] = None
                return tracer.copies.setdefault((path, name), (kind(value), value))[0]
        elif issubclass(kind, (types.FunctionType, types.BuiltinFunctionType, type)):
            if name not in object.__getattribute__(self, "__dict__"):  # of the class
                tracer.guard_method(path, name, value)
                return value
            if source_of(value) is not None:
                tracer.guards[path, "attribute", name, value] = None
                return value
        elif issubclass(kind, (_Proxy, _Watched)):  # what a property returned
            return value
        elif not callable(value) and not issubclass(kind, (nn.Module, Tensor, *CONTAINERS)):
            return _Attributes(value, tracer, f"{path}.{name}" if path else name)
        raise tracer.refuse(f"forward reads {name}, a {type(value).__name__}")

    def __getattr__(self, name: str) -> Any:
        tracer, path = self._watch
        contents = object.__getattribute__(self, "__dict__")
        where = f"{path}.{name}" if path else name
        for kind in ("_modules", *_MODULE_TENSORS):
            if name in contents[kind]:
                value = contents[kind][name]
                if value is None:
                    tracer.guards[path, "attribute", name, None] = None
                    return None
                tracer.guards[path, "present", name, kind] = None
                if kind == "_modules":
                    return tracer.watched(value, where)
                return tracer.create_proxy("get_attr", where, (), {})
        tracer.guards[path, "absent", name, None] = None
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._watch[0].refuse(f"forward sets {name}")

    def __delattr__(self, name: str) -> None:
        raise self._watch[0].refuse(f"forward deletes {name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer, path = self._watch
        return tracer.create_proxy("call_module", path, args, kwargs)


class _Attributes:
    """An object in place of one that is no module, a configuration say, of which forward may read constants."""

    def __init__(self, target: Any, tracer: _Tracer, path: str) -> None:
        vars(self).update(_target=target, _tracer=tracer, _path=path)

    def __getattr__(self, name: str) -> Any:
        tracer = self._tracer
        with tracer.paused():
            value = getattr(self._target, name, _ABSENT)
        if value is _ABSENT:
            tracer.guards[self._path, "absent", name, None] = None
            raise AttributeError(name)
        if not is_constant(value):
            raise tracer.refuse(f"forward reads {self._path}.{name}, a {type(value).__name__}")
        tracer.guards[self._path, "attribute", name, value] = None
        return value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if is_in(sys._getframe(1).f_globals.get("__name__", ""), ("fastbn", "torch")):
            return _Attributes
        raise self._tracer.refuse(f"forward asks for the type of {self._path}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._tracer.refuse(f"forward sets {self._path}.{name}")

    def __delattr__(self, name: str) -> None:
        raise self._tracer.refuse(f"forward deletes {self._path}.{name}")

    def _refuse(self, *args: Any) -> Any:
        raise self._tracer.refuse(f"forward reads {self._path}, a {type(self._target).__name__}")

    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __eq__ = __hash__ = _refuse


_ABSENT = object()


def is_constant(value: Any) -> bool:
    """Return whether a value cannot change, and its repr or name says all of it."""
    if type(value) is tuple:
        return all(is_constant(v) for v in value)
    if type(value) is float:
        return math.isfinite(value)
    if issubclass(type(value), enum.Enum):
        return str(value.name).isidentifier()  # a combination of flags has no name of its own
    return value is None or type(value) in (bool, int, str, torch.dtype)


@functools.cache
def source_of(function: Any) -> tuple[str, str] | None:
    """Return (module, qualified name) under which a function or class can be imported, or None."""
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", "")
    for module in (getattr(function, "__module__", None), *_torch.FUNCTION_MODULES, "operator"):
        found = sys.modules.get(str(module))
        for candidate in (name, getattr(function, "__name__", "")):
            value: Any = found
            for part in str(candidate).split("."):
                value = getattr(value, part, None)
            if value is function:
                return str(module), str(candidate)
    return None
