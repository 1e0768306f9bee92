"""The compiled ops of fastbn._C: one namespace, and two backends, the C++ kernels for CPUs and the CUDA kernels."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from fastbn import _C, _torch
from fastbn.ops import contract
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.dispatch import Call, Plan
from fastbn.ops.layout import runs_of, suggest_memory_format

CUDA_ARCHITECTURES: str = contract.BUILD_INFO["cuda_architectures"]

_WITHOUT_CUDA = "fastbn was built without CUDA (no nvcc, or FASTBN_CUDA=0)"
_OPS = contract.bind("fastbn")


class CpuBackend:
    """C++ kernels; moments and normalisation of a tile of a tensor follow each other while it is in a core's cache."""

    name = "cpu"
    ops: Any = _OPS
    device_types: tuple[str, ...] = ("cpu",)

    def why_not(self, call: Call) -> str | None:
        return None if call.input.is_cpu else f"the C++ kernels take no {call.input.device.type} tensors"

    def saves_mask(self, input: Tensor) -> bool:
        return True

    def plan(self, call: Call, direction: str, reason: str, limits: _C.DeviceLimits | None = None) -> Plan:
        over_channels = runs_of(tuple(call.input.shape), suggest_memory_format(call.input))[0]
        kernel = "row_tiles" if over_channels else "channel_tiles"
        reads, writes = two_phase_traffic(call, direction)
        return Plan(self.name, kernel, 1, reads, writes, 0, torch.get_num_threads(), 0, reason)

    def availability(self) -> str:
        return f"yes: {_C.build_info()['cpu_instruction_set']}, {torch.get_num_threads()} threads"


class CudaBackend:
    """CUDA kernels, by the plans of csrc/plan."""

    name = "cuda"
    ops: Any = _OPS
    device_types: tuple[str, ...] = ("cuda",)

    def why_not(self, call: Call) -> str | None:
        device = call.input.device
        return why_no_kernels(device) if device.type == "cuda" else f"the CUDA kernels take no {device.type} tensors"

    def saves_mask(self, input: Tensor) -> bool:
        # Rows of the mask are whole bytes: where a run is not a multiple of 8, backward reads the residual instead.
        return input.dim() < 2 or runs_of(tuple(input.shape), suggest_memory_format(input))[2] % 8 == 0

    def plan(self, call: Call, direction: str, reason: str, limits: _C.DeviceLimits | None = None) -> Plan:
        input = call.input
        limits = limits or _C.device_limits(input.device.index)
        wanted = {("forward", True): "forward", ("forward", False): "eval", ("backward", True): "backward"}
        plan = _C.plan(
            sizes=list(input.shape),
            strides=list(input.stride()),
            dtype=contract.DTYPES.index(input.dtype),
            direction=wanted.get((direction, call.training), "frozen_backward"),
            activation=call.activation,
            residual=call.residual is not None,
            aligned=input.device.type == "meta" or _torch.is_fake(input) or input.data_ptr() % 16 == 0,
            limits=limits,
        )
        if plan["kernel"].startswith("stream"):
            reason += f"; a ring of {plan['ring_tiles']} tiles, {plan['ahead']} ahead"
        if call.training:  # the times of other plans are not predicted: there is nothing to choose
            reason += f"; predicted, not measured: {plan['predicted_us']:.3g} us"
        if not plan.pop("vectorized"):
            reason += "; element by element, because neither runs nor rows fill aligned vectors of 8 elements"
        fields = {field.name for field in dataclasses.fields(Plan)}
        return Plan(backend=self.name, reason=reason, **{name: plan[name] for name in fields & plan.keys()})

    def availability(self) -> str:
        if not CUDA_ARCHITECTURES:
            return f"no: {_WITHOUT_CUDA}"
        if not torch.version.cuda:
            return "no: this torch was built without CUDA"
        if not _C.build_info()["finds_cuda_stream"]:
            return "no: this torch does not offer its CUDA stream"
        if not torch.cuda.is_available():
            return "no: torch sees no GPU"
        reasons = [why_no_kernels(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        return "yes" if None in reasons else f"no: {reasons[0]}"


def why_no_kernels(gpu: torch.device) -> str | None:
    """Return why the build has no kernels for a GPU of this machine, or None if it has."""
    if not CUDA_ARCHITECTURES:
        return _WITHOUT_CUDA
    capability = torch.cuda.get_device_capability(gpu)
    if not runs_on(capability, CUDA_ARCHITECTURES):
        return f"fastbn was built for {CUDA_ARCHITECTURES}, and this GPU is {capability[0]}.{capability[1]}"
    return None


@functools.cache
def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether binaries for `architectures`, as TORCH_CUDA_ARCH_LIST has them, run on a GPU of that capability.

    Code of the same major and no later minor version does, and so does PTX of any earlier version. Unknown forms may.
    """
    for architecture in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", architecture)
        if match is None:
            return True
        built = int(match[1]), int(match[2])
        if built <= capability and (built[0] == capability[0] or match[3]):
            return True
    return False


def two_phase_traffic(call: Call, direction: str) -> tuple[float, float]:
    """Return (reads, writes) in units of S of a phase that sums and one that applies; frozen statistics need one."""
    residual, has_activation = call.residual is not None, call.activation != 0
    masked = residual and is_piecewise_linear(call.activation)
    mask = 1 / (8 * call.input.element_size()) if masked else 0.0
    if direction == "forward":
        return (2.0 if call.training else 1.0) + residual, 1.0 + mask
    writes = 1.0 + (residual and has_activation)
    if call.training:
        derivative = 0.0 if not has_activation else mask if masked else float(residual)
        return 2 * (2 + derivative), writes
    return (1.0 if not has_activation else 1 + mask if masked else 2.0 + residual), writes


CPU = CpuBackend()
CUDA = CudaBackend()


def warn_of_gpus_without_kernels() -> None:
    """Warn once of each GPU that this build has no kernels for, if it has any: users of a build without expect none."""
    for index in range(torch.cuda.device_count() if CUDA_ARCHITECTURES else 0):
        reason = why_no_kernels(torch.device("cuda", index))
        if reason is not None:
            warnings.warn(f"{reason} (cuda:{index}): other backends run there, as `fastbn info` says", stacklevel=2)


if CUDA_ARCHITECTURES and torch.version.cuda:
    _torch.when_cuda_starts(warn_of_gpus_without_kernels)
