"""Saved-tensor hooks that users apply around a forward pass; each returns the same values."""

from __future__ import annotations

import contextlib
import io
import tempfile

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


def _to_numpy(t: Tensor):
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integers).numpy().copy(), t.dtype


def _from_numpy(packed) -> Tensor:
    data, dtype = packed
    return torch.from_numpy(data).view(dtype)


def _to_memory(t: Tensor) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(t, stream)
    return stream


def _from_memory(stream: io.BytesIO) -> Tensor:
    stream.seek(0)
    return torch.load(stream)


def _to_disk(t: Tensor):
    file = tempfile.NamedTemporaryFile(suffix=".pt")
    torch.save(t, file.name)
    return file


_PACKS = {
    "contiguous": (lambda t: t.contiguous(), lambda t: t),
    "channels_last": (_channels_last, lambda t: t),
    "numpy": (_to_numpy, _from_numpy),
    "memory": (_to_memory, _from_memory),
    "disk": (_to_disk, lambda file: torch.load(file.name)),
}
HOOKS = (*_PACKS, "save_on_cpu")


def hooks(name: str | None) -> contextlib.AbstractContextManager:
    if name is None:
        return contextlib.nullcontext()
    return save_on_cpu() if name == "save_on_cpu" else saved_tensors_hooks(*_PACKS[name])
