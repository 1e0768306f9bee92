"""The memory layout of an activation: the format of output and gradients, runs, and the bits of the mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def suggest_memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of output and gradients.

    A tensor that is dense in exactly one format has that format. For all others the answer is that of ATen's
    Tensor.suggest_memory_format, which depends on the strides of dimensions of size 1 too.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats:
        return torch.contiguous_format
    if _has_strides_of_channels_last(x):
        return formats[x.dim()]
    last = x.is_contiguous(memory_format=formats[x.dim()]) and not x.is_contiguous()
    return formats[x.dim()] if last else torch.contiguous_format


def _has_strides_of_channels_last(x: Tensor) -> bool:
    """Return whether strides are those of channels_last, up to gaps, and not of a contiguous tensor with sizes of 1."""
    if x.stride(1) == 0:
        return False
    min_stride = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) == 0 or x.stride(d) < min_stride or (d == 0 and min_stride == x.stride(1)):
            return False
        min_stride = x.stride(d) * x.size(d)
    return True


def runs_of(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[bool, int, int]:
    """Return (whether a run goes over the channels, runs, elements per run) of a tensor of that shape and format."""
    outer, channels, inner = shape[0], shape[1], math.prod(shape[2:])
    if channels == 1:  # one long run, whatever the format
        return False, 1, outer * inner
    if memory_format != torch.contiguous_format or inner == 1:
        return True, outer * inner, channels
    return False, outer * channels, inner


def mask_shape(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    """Return [rows, ceil(C / 8)] where a run goes over the channels, otherwise [N, C, ceil(run / 8)]."""
    over_channels, runs, run = runs_of(shape, memory_format)
    width = (run + 7) // 8
    if over_channels:
        return runs, width
    return (1, 1, width) if shape[1] == 1 else (shape[0], shape[1], width)


def pack_mask(upper: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Pack a bool tensor (N, C, *) into uint8 of `mask_shape`: element i of a run is bit i % 8 of byte i / 8."""
    shape = tuple(upper.shape)
    over_channels, runs, run = runs_of(shape, memory_format)
    bits = (upper.movedim(1, -1) if over_channels else upper).reshape(runs, run)
    width = (run + 7) // 8
    bits = F.pad(bits.to(torch.uint8), (0, width * 8 - run)).view(runs, width, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=upper.device)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(mask_shape(shape, memory_format))


def unpack_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack what `pack_mask` packed, in whatever memory format, into a bool tensor of `shape`."""
    shape = tuple(shape)
    over_channels = mask.dim() == 2
    run = shape[1] if over_channels else math.prod(shape) // math.prod(mask.shape[:2]) if mask.numel() else 0
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :run].bool()
    if over_channels:
        return bits.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return bits.reshape(shape)
