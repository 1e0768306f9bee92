"""What a forward calls and reads while it is traced, so that a trace is refused where that may change unseen.

A profiler sees the calls, and byte code what a function reads beside its arguments.
"""

from __future__ import annotations

import dis
import enum
import functools
import gc
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import fx

from fastbn import _torch


class Tracer(Protocol):
    """What watching needs of a tracer."""

    refused: str | None
    is_paused: bool
    asks_class: bool
    guards: dict[Any, None]

    def refuse(self, reason: str) -> Exception: ...

    def guard_functions(self, code: types.CodeType, scope: dict[str, Any]) -> None: ...

    def guard_base(self, code: types.CodeType, variables: dict[str, Any]) -> None: ...


# What forward may call beside functions of the traced values: it depends on its arguments alone.
_BUILTINS = frozenset(
    "isinstance issubclass len getattr hasattr callable min max sum abs all any iter next sorted round divmod".split()
)
PLAIN_CONTAINERS = (
    tuple,
    list,
    dict,
    torch.Size,
    fx.immutable_collections.immutable_list,
    fx.immutable_collections.immutable_dict,
)
CONTAINERS = (list, tuple, dict, str, set, frozenset, int, float, range, slice, types.MappingProxyType)
_PURE_MODULES = (
    "math",
    "_operator",
    "operator",
    "itertools",
    "collections",
    "functools",
    "typing",
    "enum",
    "_abc",
    "abc",
)
_ALLOWED_MODULES = (
    "fastbn",
    "torch.fx",
    "torch.nn.functional",
    "torch.functional",
    "torch.nn.modules",
    "torch.overrides",
    _torch.DeviceContext.__module__,
    *_PURE_MODULES,
)
# False unless torch records what is called. is_scripting is False whenever Python runs.
_FALSE_IN_EAGER = frozenset("is_tracing is_compiling is_dynamo_compiling is_exporting is_in_onnx_export".split())
_TORCH_FUNCTIONS = frozenset(("_assert", "is_tensor", "is_floating_point", "is_scripting"))
_READABLE = (
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    type,
    torch.dtype,
    torch.memory_format,
    type(typing.Optional),
    type(typing.List),  # noqa: UP006
)
_OWNERS = (types.ModuleType, type, types.FunctionType)
_SUSPECTS = frozenset(
    "type object id vars globals locals open input print exec eval setattr delattr __import__".split()
)


@functools.cache
def _overridable() -> frozenset[Any]:
    """Return the functions that a proxy among their arguments records, those in place (torch.relu_) among them."""
    listed = torch.overrides.get_overridable_functions()
    found = {function for functions in listed.values() for function in functions}
    in_place = [getattr(torch, f"{getattr(function, '__name__', '')}_", None) for function in found]
    return frozenset([*found, *in_place])


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _is_of_model(frame: Any) -> bool:
    """Return whether a frame runs code of the model: neither of torch nor of fastbn nor of Python's library."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package not in ("torch", "fastbn") and package not in sys.stdlib_module_names


def call(forward: Callable[..., Any], twin: Any, inputs: list[Any]) -> Any:
    return forward(twin, *inputs)


@contextmanager
def watched_calls(tracer: Tracer) -> Iterator[None]:
    """Refuse a trace in which the model's own code calls or reads what may answer differently another time."""

    nested: set[types.CodeType] = set()  # code of functions that traced code defines, whose closure is its variables

    def watch(frame: Any, event: str, argument: Any) -> None:
        if tracer.refused is not None or tracer.is_paused:
            return
        reason: str | None = None
        if event == "c_call" and _is_of_model(frame):
            reason = _why_not_builtin(argument)
        elif event == "call":
            if _is_of_model(frame):
                code = frame.f_code
                reason = _why_not_code(code, frame.f_globals)
                tracer.guard_functions(code, frame.f_globals)
                tracer.guard_base(code, frame.f_locals)
                tracer.asks_class |= not {"isinstance", "issubclass"}.isdisjoint(code.co_names)
                if code not in nested and not all(_is_readable(frame.f_locals[name]) for name in code.co_freevars):
                    reason = "forward is a closure over values"
                nested.update(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
            elif _is_of_model(frame.f_back) or frame.f_back.f_code is call.__code__:
                name, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
                if function in _FALSE_IN_EAGER:
                    tracer.guards["", "eager", "", None] = None
                elif not is_in(name, _ALLOWED_MODULES) and function not in _TORCH_FUNCTIONS:
                    reason = f"forward calls {name}.{function}"
        if reason is not None:
            raise tracer.refuse(reason)

    before: Any = sys.getprofile()
    is_of_c = hasattr(before, "enable")  # cProfile's, which only starts by itself
    collects_garbage = gc.isenabled()
    gc.disable()  # finalisers and gc.callbacks, of others, would be watched as well
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None if is_of_c else before)
        if collects_garbage:
            gc.enable()
        if is_of_c:
            before.enable()


def _why_not_builtin(function: Any) -> str | None:
    module, name = getattr(function, "__module__", None), function.__name__
    owner = getattr(function, "__self__", None)
    if module == "builtins" and name in _BUILTINS or is_in(str(module), _PURE_MODULES):
        return None
    if isinstance(owner, CONTAINERS) or type(owner).__name__.endswith(("_iterator", "_keys", "_values", "_items")):
        return None
    if type(owner) is type and issubclass(owner, CONTAINERS) or isinstance(function, types.MethodWrapperType):
        return None
    try:
        if function in _overridable():
            return None
    except TypeError:
        pass
    return f"forward calls {module or type(owner).__name__}.{name}"


def _is_readable(value: Any) -> bool:
    """Return whether the model may read a value of a global or closure: what it does shows when it is called."""
    return isinstance(value, _READABLE)


def _why_not_code(code: types.CodeType, scope: dict[str, Any]) -> str | None:
    """Return why what a function of the model reads beside its arguments may change, or None."""
    read: Any = None
    opname = ""
    for instruction in dis.get_instructions(code):
        before, opname = opname, instruction.opname
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            name = instruction.argval
            if name not in scope:
                if name in _SUSPECTS:
                    return f"forward calls {name}"
                read = None
                continue
            read = scope[name]
        elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR") and isinstance(read, _OWNERS):
            return f"forward sets the global {instruction.argval}"
        elif instruction.opname == "LOAD_ATTR" and instruction.argval == "__class__":
            return "forward reads __class__"
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(read, _OWNERS):
            name = instruction.argval
            if isinstance(read, type) and (issubclass(read, enum.Enum) or callable(getattr(read, name, None))):
                read = None
                continue
            read = getattr(read, name, None)
        elif instruction.opname == "IMPORT_NAME" and not is_in(instruction.argval, ("torch",)):
            return f"forward imports {instruction.argval}"
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"forward sets the global {instruction.argval}"
        elif instruction.opname == "IS_OP" and before.startswith(("LOAD_FAST", "LOAD_DEREF")):
            return "forward compares two values by identity"
        elif instruction.opname in ("PRECALL", "CACHE"):
            continue
        else:
            read = None
            continue
        # Calls of other objects (those of Cython, say) go past a profiler.
        if not _is_readable(read):
            return f"forward reads the global {name}, a {type(read).__name__}"
    return None
