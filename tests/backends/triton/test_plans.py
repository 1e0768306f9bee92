"""The rules that choose paths and blocks: pure functions, asked without a GPU and without Triton."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastbn.backends.triton import plans
from fastbn.backends.triton.plans import Layout, Limits
from fastbn.testing import cases

H200 = Limits()
SMALL_LIMITS = Limits(sm_count=1, resident_elements=0, block_elements=256)
LAYOUTS = sorted(
    {
        plans.layout_of(case.shape, torch.channels_last if "last" in case.layout else torch.contiguous_format)
        for case in cases.CASES
        if case.numel
    },
    key=str,
)
LAYOUTS += [Layout(128, 256, 56 * 56), Layout(128 * 56 * 56, 256, 1), Layout(1, 1, 2**33), Layout(2**20, 3, 1)]


def _rows(layout: Layout) -> int:
    return layout.outer if layout.inner == 1 else layout.outer * math.ceil(layout.inner / 8)


@pytest.mark.parametrize("limits", [H200, SMALL_LIMITS], ids=["h200", "small"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_tiles_and_splits_cover_the_tensor_once(dtype, limits):
    for layout in LAYOUTS:
        blocks = plans.split(layout, dtype, limits)
        assert (blocks.splits - 1) * blocks.rows_per_split < _rows(layout) <= blocks.splits * blocks.rows_per_split
        assert blocks.rows_per_split % blocks.tile.rows == 0
        assert blocks.rows_per_split <= plans.MAX_STEPS * blocks.tile.rows
        assert blocks.run_units * blocks.tile.unit == (layout.inner if layout.inner > 1 else layout.channels)
        if blocks.tile.by_rows:
            width = blocks.tile.vectors * plans.VEC
            assert (blocks.tiles - 1) * width < layout.channels <= blocks.tiles * width
        else:
            assert blocks.tile.vectors == 1 and blocks.tiles == layout.channels


@pytest.mark.parametrize("tensors", [1, 2])
def test_a_resident_tile_has_the_whole_channel_and_fits(tensors):
    kept = 0
    for layout, dtype in itertools.product(LAYOUTS, cases.DTYPES):
        blocks = plans.resident(layout, dtype, tensors, H200)
        if blocks is None:
            vectors = 1 if layout.inner > 1 else 8
            assert _rows(layout) * vectors * 8 > H200.resident_elements // tensors // 8
            continue
        kept += 1
        assert blocks.splits == 1 and blocks.tile.rows >= _rows(layout)
        assert blocks.tile.elements * tensors <= H200.resident_elements
        assert blocks.tile.elements * tensors <= 32 * 32 * blocks.warps  # 32 numbers per lane
    assert kept > len(LAYOUTS)


def test_large_activations_give_every_sm_work():
    for layout in (Layout(128, 64, 56 * 56), Layout(128 * 56 * 56, 64, 1), Layout(4096, 512, 1)):
        blocks = plans.split(layout, torch.bfloat16, H200)
        assert blocks.programs >= H200.sm_count


def test_offsets_are_64_bit_where_32_bits_do_not_reach():
    for dtype in cases.DTYPES:
        assert not plans.split(Layout(2**9, 2**10, 2**10), dtype, H200).tile.is_int64
        assert plans.split(Layout(2**11, 2**10, 2**10), dtype, H200).tile.is_int64
        assert plans.split(Layout(2**21, 2**10, 1), dtype, H200).tile.is_int64
        # Offsets of rows beyond the last are computed too.
        assert plans.split(Layout(1, 1, 2**31 - 8), dtype, H200).tile.is_int64


@pytest.mark.parametrize("inner", [1, 49, 196, 3136])
def test_batch_sizes_share_their_tiles(inner):
    """Tiles are constants of the kernels: each new one is compiled."""

    def tiles(sizes):
        found = set()
        for n in sizes:
            layout = Layout(n * 49 if inner == 1 else n, 64, inner)
            found |= {plans.resident(layout, torch.bfloat16, tensors, H200) for tensors in (1, 2)} - {None}
            found.add(plans.split(layout, torch.bfloat16, H200))
        return {blocks.tile for blocks in found}

    assert len(tiles(range(65, 129))) <= 3
    assert len(tiles(range(1, 1025))) <= 8


def test_a_tile_by_rows_is_no_wider_than_the_tensor():
    assert plans.split(Layout(1000, 3, 1), torch.float32, H200).tile.vectors == 1
    assert plans.split(Layout(1000, 300, 1), torch.float32, H200).tile.vectors == 4  # 128 bytes
    assert plans.split(Layout(1000, 300, 1), torch.bfloat16, H200).tile.vectors == 8
