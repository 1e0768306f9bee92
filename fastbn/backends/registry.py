"""The backends by name, which of them serves a device, and what each can do."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from fastbn.backends import reference
from fastbn.ops import contract
from fastbn.ops.layout import runs_of, suggest_memory_format

CUDA_ARCHITECTURES: str = contract.BUILD_INFO["cuda_architectures"]

_backends: dict[str, Any] = {}


def namespace(backend: str) -> Any:
    """What holds the eight ops of a backend as attributes. ValueError for an unknown name."""
    try:
        return _backends[backend]
    except KeyError:
        raise ValueError(f"backend: expected one of {', '.join(_backends)}, torch, got {backend!r}") from None


def backends() -> tuple[str, ...]:
    """The names that `namespace` knows."""
    return tuple(_backends)


def default_backend(device: torch.device) -> tuple[str | None, str]:
    """(the backend that serves tensors of a device, or None, and why)."""
    if device.type == "cpu":
        return "cpu", "CPU tensors run on the C++ kernels"
    if device.type == "cuda":
        if not CUDA_ARCHITECTURES:
            return None, "fastbn was built without CUDA (no nvcc, or FASTBN_CUDA=0)"
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(capability, CUDA_ARCHITECTURES):
            return None, f"fastbn was built for {CUDA_ARCHITECTURES}, and this GPU is {capability[0]}.{capability[1]}"
        return "cuda", "CUDA tensors run on the CUDA kernels"
    return None, f"fastbn has no kernels for {device.type} tensors"


def backend_of(input: Tensor) -> str | None:
    """What `default_backend` says of its device, in less time."""
    return "cpu" if input.is_cpu else default_backend(input.device)[0]


@functools.cache
def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether binaries for `architectures`, in the form of TORCH_CUDA_ARCH_LIST, run on a GPU of that capability.

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


def saves_mask(backend: str, input: Tensor) -> bool:
    """Whether backward finds the derivative of a piecewise linear activation after a residual in the mask.

    CUDA needs byte-aligned rows of the mask: where a run is not a multiple of 8, backward reads the residual instead.
    """
    if backend in ("cpu", "reference") or input.dim() < 2:
        return True
    return runs_of(tuple(input.shape), suggest_memory_format(input))[2] % 8 == 0


def why_unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors of a device; None if it can. ValueError for an unknown name."""
    namespace(backend)
    served, reason = default_backend(device)
    return reason if backend in ("cpu", "cuda") and served != backend else None


def register(backend: str, ops: str) -> None:
    """Make a backend of the C++ ops of the torch.ops namespace `ops`."""
    _backends[backend] = contract.bind(ops)


register("cpu", "fastbn")
_backends["cuda"] = _backends["cpu"]
_backends["reference"] = reference
