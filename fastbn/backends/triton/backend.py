"""Triton as a backend: for GPUs that the extension has no kernels for, NVIDIA's and AMD's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastbn._C import DeviceLimits
from fastbn.backends import native
from fastbn.backends.triton import plans, tuning
from fastbn.ops import contract
from fastbn.ops.dispatch import Call, Plan
from fastbn.ops.layout import suggest_memory_format

NAMESPACE = "fastbn_triton"
# Asked once, since Dynamo traces `why_not`. Finding a module does not import it.
_IS_INSTALLED = importlib.util.find_spec("triton") is not None
# Under Triton's interpreter kernels run on the CPU, in Python: for tests.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MIN_CAPABILITY = (8, 0)


def _implementation(name: str) -> Callable[..., Any]:
    """Return the function of an op, which imports Triton and the kernels when it is first called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("fastbn.backends.triton.ops"), name)(*arguments)

    return call


def _register() -> SimpleNamespace:
    """Define the ops with the schemas of the compiled ones, and bind them as those are bound."""
    library = torch.library.Library(NAMESPACE, "DEF")
    contract.libraries.append(library)
    for name in contract.OPS:
        schema = str(getattr(torch.ops.fastbn, name).default._schema)
        library.define(schema.removeprefix("fastbn::"))
        for key in ("CUDA", "CPU") if _IS_INTERPRETED else ("CUDA",):
            library.impl(name, _implementation(name), key)
    return contract.bind(NAMESPACE)


class TritonBackend:
    """The kernels of this folder. They run where Triton does: on NVIDIA's GPUs from sm_80 on, and on AMD's."""

    name = "triton"
    ops: Any = _register()
    device_types: tuple[str, ...] = ("cuda",)

    def why_not(self, call: Call) -> str | None:
        device = call.input.device
        if not _IS_INSTALLED:
            return "Triton is not installed"
        if device.type == "meta":
            return None
        if _IS_INTERPRETED:
            return None if device.type == "cpu" else "TRITON_INTERPRET=1 makes Triton interpret its kernels, on the CPU"
        if device.type != "cuda":
            return f"the Triton kernels take no {device.type} tensors"
        return _why_not_on(device)

    def saves_mask(self, input: Tensor) -> bool:
        return True

    def plan(self, call: Call, direction: str, reason: str, limits: DeviceLimits | None = None) -> Plan:
        input = call.input
        layout = plans.layout_of(tuple(input.shape), suggest_memory_format(input))
        if limits:
            known = plans.Limits(limits.sm_count)
        else:
            known = tuning.known_limits(input.device, layout, input.dtype, direction)
            if input.device.type != "cuda":
                reason += f"; planned for {known.sm_count} SMs"
        is_forward = direction == "forward"
        blocks = None
        if call.training or not is_forward:
            blocks = plans.resident(layout, input.dtype, 1 if is_forward else 2, known)
        reads, writes = native.two_phase_traffic(call, direction)
        if blocks is not None:
            kernel, launches = "resident", 1
            if call.training:
                reads = reads - 1 if is_forward else reads / 2
            reason += "; a program keeps a whole tile in its registers"
        else:
            blocks = plans.split(layout, input.dtype, known)
            kernel, launches = "split", 3 if call.training else 1
        kernel += "_rows" if blocks.tile.by_rows else "_channels"
        if blocks.tile.is_int64:
            reason += "; offsets are 64-bit"
        threads = blocks.warps * (64 if torch.version.hip else 32)
        reason += "; not measured on a GPU yet"
        return Plan(self.name, kernel, launches, reads, writes, blocks.programs, threads, 0, reason)

    def availability(self) -> str:
        if not _IS_INSTALLED:
            return "no: Triton is not installed (pip install triton, or a torch with CUDA or ROCm, which brings it)"
        if _IS_INTERPRETED:
            return "yes: interpreted on the CPU (TRITON_INTERPRET=1), for tests"
        if not torch.cuda.is_available():
            return "no: torch sees no GPU"
        reason = _why_not_on(torch.device("cuda", torch.cuda.current_device()))
        if reason:
            return f"no: {reason}"
        plans_are = ", plans by measurement (FASTBN_TRITON_TUNE=1)" if tuning.IS_ON else ""
        return f"yes: Triton {importlib.metadata.version('triton')}{plans_are}"


def _why_not_on(gpu: torch.device) -> str | None:
    """Return why Triton does not compile for a GPU of this machine, or None if it does."""
    capability = torch.cuda.get_device_capability(gpu)
    if torch.version.hip is None and capability < _MIN_CAPABILITY:
        needed, got = (".".join(map(str, version)) for version in (_MIN_CAPABILITY, capability))
        return f"Triton compiles for GPUs from {needed} on, and this one is {got}"
    return None


TRITON = TritonBackend()
