"""The backends by name, and the one place that decides which of them serves a call."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastbn.backends import aten, crossings, native
from fastbn.backends.reference.backend import REFERENCE
from fastbn.backends.triton.backend import TRITON
from fastbn.ops import dispatch
from fastbn.ops.dispatch import Backend, Call

# For editors, which complete it.
Name: TypeAlias = Literal["cpu", "cuda", "triton", "reference", "torch"]

_backends: dict[str, Backend] = {}
# The backends for each type of device, the fastest first.
_offered: dict[str, list[Backend]] = {}


def register(backend: Backend) -> None:
    """Register a backend under its name, and offer it calls on its types of devices after those registered before."""
    _backends[backend.name] = backend
    for device_type in backend.device_types:
        _offered.setdefault(device_type, []).append(backend)


def get(name: str) -> Backend:
    """Return the backend of that name. Raises ValueError for an unknown one."""
    try:
        return _backends[name]
    except KeyError:
        raise ValueError(f"backend: expected one of {', '.join(_backends)}, got {name!r}") from None


def names() -> tuple[str, ...]:
    """Return the names that `get` knows."""
    return tuple(_backends)


def choose(call: Call, name: str | None = None, *, ask_all: bool = False) -> tuple[Backend, str | None]:
    """Return (the backend that serves a call, why no faster one does: None where there is none).

    name: the backend that was asked for, None for the fastest. ask_all: whether to ask even what the ops check
    themselves, which takes 3 us; without it an eager call may be given to a backend that refuses it with a RuntimeError
    before anything has changed. Traced calls, where nobody could answer that, are always asked all.

    Raises ValueError for an unknown name, and for a named backend that cannot take the call.
    """
    if name is not None:
        backend = get(name)
        reason = None if backend is aten.TORCH else backend.why_not(call) or dispatch.why_unsupported(call)
        if reason is not None:
            raise ValueError(f"batch_norm: backend {name!r} cannot take this call: {reason}")
        return backend, "asked for by name"
    ask_all = ask_all or type(call.input) is not Tensor or torch.compiler.is_compiling()
    reason = dispatch.why_torch_must_see(call)
    if reason is None and ask_all:
        reason = dispatch.why_refused(call) or _why_not_saved(call) or _why_left_to_compiler(call)
    if reason is None:
        reason = dispatch.why_left_to_torch(call) or crossings.why_torch_is_faster(call)
    if reason is not None:
        return aten.TORCH, reason
    return _fastest(call)


def choose_ops(call: Call) -> Backend:
    """Return the fastest backend that has ops for a call which torch's own operations cannot serve, whatever its size.

    Raises ValueError where there is none, or where torch would have to look through the call.
    """
    reason = dispatch.why_torch_must_see(call)
    if reason is None:
        backend, reason = _fastest(call)
        if backend is not aten.TORCH:
            return backend
    raise ValueError(f"batch_norm: cannot take this call: {reason}")


def _fastest(call: Call) -> tuple[Backend, str | None]:
    """Return the first backend that is offered a call and takes it, and why none before it does."""
    reason = None
    device_type = "cpu" if call.input.is_cpu else call.input.device.type
    for backend in _offered.get(device_type, ()):
        why_not = backend.why_not(call)
        if why_not is None:
            return backend, reason
        reason = f"{reason}; {why_not}" if reason else why_not
    return aten.TORCH, reason or f"fastbn has no kernels for {device_type} tensors"


def _why_not_saved(call: Call) -> str | None:
    """Return why torch has to refuse a call in its own words, whose gradient would need an inference tensor."""
    if not torch.compiler.is_compiling() and dispatch.is_recorded(call) and dispatch.cannot_be_saved(*call[:6]):
        return "an inference tensor cannot be saved for backward"
    return None


def _why_left_to_compiler(call: Call) -> str | None:
    """Return why a call that is being compiled is left to torch's operations, which the compiler may rewrite."""
    if not torch.compiler.is_compiling() or call.training or dispatch.is_recorded(call):
        return None
    return "without gradients the compiler folds torch's batch_norm into a convolution or fuses it with its neighbours"


register(native.CPU)
register(native.CUDA)
register(TRITON)
register(REFERENCE)
register(aten.TORCH)
