"""The choice of path and blocks for a tensor: pure rules from its layout, dtype and the number of SMs.

Nothing here was measured on a GPU: every constant is an estimate, with its reason beside it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbn.ops.layout import runs_of, suggest_memory_format

VEC = 8  # elements of a vector, and bits of a byte of the mask


@dataclass(frozen=True)
class Limits:
    """What a plan depends on beside the tensor. Tests choose small numbers, so that small tensors take every path."""

    sm_count: int = 132  # an H200's, for plans without a GPU
    # Elements of a tile that a program keeps, forward: 32 numbers for each thread of 16 warps, of the 128 registers
    # that it has. Backward keeps two numbers per element.
    resident_elements: int = 16384
    # Elements of a program at a time, where a tensor is read twice: 16 per thread, which are two to four loads of 16
    # bytes in flight, and leave registers for eight programs per SM.
    block_elements: int = 2048
    # Programs that a pass over the tensor has per SM, at least: they come and go, so that the last ones leave few SMs
    # idle.
    programs_per_sm: int = 8
    max_int32: int = 2**31 - 1  # the largest offset that is computed in 32 bits


# Blocks that a lane adds up in float32 before its sum goes on in float64: the error of so few terms is below that of
# their products.
MAX_STEPS = 16
# Bytes of a row that neighbouring threads read together: two sectors of DRAM (64 bytes each) where there is a choice.
ROW_BYTES = 128
MIN_ROW_BYTES = 64
ELEMENTS_PER_WARP = 1024  # 32 per lane of 32, of a program that keeps one float32 tensor
MIN_TILE = 256  # elements: smaller tiles would be many variants to compile, for tensors whose launch takes all the time
# A program of the finish kernel adds up 128 splits of 8 channels at a time: 64 bytes of a row of partial sums.
FINISH_CHANNELS, FINISH_SPLITS = 8, 128
FEW = 8


@dataclass(frozen=True)
class Layout:
    """A dense tensor as [outer, channels, inner] (docs/design.md)."""

    outer: int
    channels: int
    inner: int

    @property
    def numel(self) -> int:
        return self.outer * self.channels * self.inner


@dataclass(frozen=True)
class Tile:
    """The constants of a kernel that say how a program walks (tile.py). Sizes are not among them."""

    by_rows: bool
    unit: int  # a power of two up to 8 that divides every run
    rows: int
    vectors: int
    is_int64: bool  # whether offsets are
    is_float64: bool  # whether elements are

    @property
    def few_rows(self) -> int:
        """Return the rows that the sums in float64 take at once, where float32 is usual."""
        return max(self.rows // FEW, 1)

    @property
    def elements(self) -> int:
        return self.rows * self.vectors * VEC


@dataclass(frozen=True)
class Blocks:
    """A plan: the tile, the tiles of the tensor, and the splits that share the rows of one."""

    tile: Tile
    tiles: int
    splits: int
    rows_per_split: int
    warps: int
    run_units: int

    @property
    def programs(self) -> int:
        return self.tiles * self.splits


def layout_of(shape: tuple[int, ...], memory_format: torch.memory_format) -> Layout:
    """Return the layout of a dense tensor. A single channel is one long run in every format."""
    if 0 in shape:
        return Layout(0, shape[1], 1)
    over_channels, runs, run = runs_of(shape, memory_format)
    if over_channels:
        return Layout(runs, run, 1)
    return Layout(runs // shape[1], shape[1], run)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _tile(layout: Layout, dtype: torch.dtype, limits: Limits, rows: int, vectors: int) -> Tile:
    run = layout.channels if layout.inner == 1 else layout.inner
    unit = math.gcd(run, VEC)
    # Offsets of rows that do not exist are computed too.
    is_int64 = layout.numel + rows * vectors * VEC * max(layout.channels, 1) > limits.max_int32
    return Tile(layout.inner == 1, unit, rows, vectors, is_int64, dtype == torch.float64)


def _rows_and_tiles(layout: Layout, vectors: int) -> tuple[int, int]:
    """Return the rows of a tile and the number of tiles."""
    if layout.inner > 1:
        return layout.outer * math.ceil(layout.inner / VEC), layout.channels
    return layout.outer, math.ceil(layout.channels / (vectors * VEC))


def _vectors_of(layout: Layout, row_bytes: int, dtype: torch.dtype) -> int:
    if layout.inner > 1:
        return 1
    return min(_power_of_two(row_bytes // (VEC * dtype.itemsize)), _power_of_two(math.ceil(layout.channels / VEC)))


def _run_units(layout: Layout, tile: Tile) -> int:
    return (layout.channels if tile.by_rows else layout.inner) // tile.unit


@functools.lru_cache(maxsize=4096)
def resident(layout: Layout, dtype: torch.dtype, tensors: int, limits: Limits) -> Blocks | None:
    """Return the plan of one launch whose programs keep a tile of `tensors` tensors; None where a tile is too large."""
    if layout.numel == 0:
        return None
    # By rows a thread has the coefficients of eight channels, which take as many registers as 16 elements.
    share = tensors * (2 if dtype == torch.float64 else 1) * (2 if layout.inner == 1 else 1)
    limit = limits.resident_elements // share
    vectors = _vectors_of(layout, MIN_ROW_BYTES, dtype)
    rows, tiles = _rows_and_tiles(layout, vectors)
    padded = max(_power_of_two(rows), min(MIN_TILE, limit) // (vectors * VEC), 1)
    tile = _tile(layout, dtype, limits, padded, vectors)
    if tile.elements > limit:
        return None
    warps = min(max(tile.elements * share // ELEMENTS_PER_WARP, 1), 16)
    return Blocks(tile, tiles, 1, padded, warps, _run_units(layout, tile))


@functools.lru_cache(maxsize=4096)
def split(layout: Layout, dtype: torch.dtype, limits: Limits) -> Blocks:
    """Return the plan of a pass over the tensor: enough splits to fill the GPU, each of at most MAX_STEPS blocks."""
    vectors = _vectors_of(layout, ROW_BYTES, dtype)
    elements = limits.block_elements // (2 if dtype == torch.float64 else 1)
    vectors = min(vectors, max(elements // VEC, 1))
    block_rows = max(elements // (vectors * VEC), 1)
    rows, tiles = _rows_and_tiles(layout, vectors)
    tile = _tile(layout, dtype, limits, block_rows, vectors)
    blocks = max(math.ceil(rows / block_rows), 1)
    wanted = math.ceil(limits.programs_per_sm * limits.sm_count / tiles)
    steps = min(max(blocks // wanted, 1), MAX_STEPS)
    splits = math.ceil(blocks / steps)
    return Blocks(tile, tiles, splits, steps * block_rows, 4, _run_units(layout, tile))


def layout_of_tensor(tensor: Tensor) -> Layout:
    return layout_of(tuple(tensor.shape), suggest_memory_format(tensor))
