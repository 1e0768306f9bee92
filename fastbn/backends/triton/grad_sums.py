"""The sums of grad_z and of grad_z * xhat per channel, which are the gradients of bias and weight.

The second is summed as grad_z * (x - pivot), about a number near the mean, and corrected to xhat once per channel. Like
those of moments.py, sums are taken in float32, and once more in float64 where they overflow or underflow.
"""

import triton
import triton.language as tl

from fastbn.backends.triton.activations import activate_backward, masked_backward
from fastbn.backends.triton.channels import (
    affine_of,
    apply_affine,
    is_finite,
    load_or,
    pivot_of_grad_sums,
    store_channels,
)
from fastbn.backends.triton.moments import add_partials, store_partials
from fastbn.backends.triton.tile import (
    channels_of,
    load,
    load_mask,
    locate,
    number,
    part_of_program,
    sum_per_channel,
)


@triton.jit
def load_grad_z(grad_out, residual, mask, x, affine, param, place, TILE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return grad_z = grad_out * activation'(z) of a tile's elements, and 0 where there are none.

    The derivative comes from the mask if there is one. Otherwise z is computed again.
    """
    grad = load(grad_out, place, TILE)
    if mask is not None:
        grad = masked_backward(load_mask(mask, place), grad, param, ACTIVATION)
    elif ACTIVATION != "none":
        z = apply_affine(x, affine)
        if residual is not None:
            z += load(residual, place, TILE)
        grad = tl.where(place[1], activate_backward(z, grad, param, ACTIVATION), 0.0)
    return grad


@triton.jit
def shifted_grad_sums(
    tensors,
    affine,
    pivot,
    param,
    tile,
    first_row,
    end_row,
    WALK,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Return the sums per channel of grad_z and grad_z * (x - pivot) over some rows of a tile, added up in SUM."""
    grad_out, input, residual, mask = tensors
    sum = tl.zeros([ROWS, TILE.vectors, 8], SUM)
    shifted = tl.zeros([ROWS, TILE.vectors, 8], SUM)
    for row in range(first_row, end_row, ROWS):
        place = locate(row, tile, WALK, TILE, ROWS)
        x = load(input, place, TILE)
        grad_z = load_grad_z(grad_out, residual, mask, x, affine, param, place, TILE, ACTIVATION).to(SUM)
        sum += grad_z
        shifted += grad_z * tl.where(place[1], x.to(SUM) - pivot.to(SUM)[None], 0.0)
    # A lane's sums may cancel with its neighbours'.
    return sum_per_channel(sum.to(tl.float64), TILE), sum_per_channel(shifted.to(tl.float64), TILE)


@triton.jit
def is_enough(sum, shifted, inv_std):
    """Return whether float32 sums are as good as float64 ones, of all channels of a tile.

    They are not if one overflowed, or if products underflowed whose sum shows: where inv_std is large.
    """
    lost = (shifted != 0) | ((sum != 0) & (inv_std >= 1048576.0))  # 2 ** 20
    underflowed = (tl.abs(shifted) < 1e-30) & lost
    return tl.min((is_finite(sum) & is_finite(shifted) & (underflowed == 0)).to(tl.int32)) == 1


@triton.jit
def grad_sums_of_part(
    tensors, affine, pivot, inv_std, param, tile, first_row, end_row, WALK, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Return `shifted_grad_sums` of some rows of a tile in float32, or in float64 where that is not enough."""
    if TILE.is_float64:
        sum, shifted = shifted_grad_sums(
            tensors, affine, pivot, param, tile, first_row, end_row, WALK, TILE, TILE.rows, tl.float64, ACTIVATION
        )
    else:
        sum, shifted = shifted_grad_sums(
            tensors, affine, pivot, param, tile, first_row, end_row, WALK, TILE, TILE.rows, tl.float32, ACTIVATION
        )
        if not is_enough(sum, shifted, inv_std):
            sum, shifted = shifted_grad_sums(
                tensors,
                affine,
                pivot,
                param,
                tile,
                first_row,
                end_row,
                WALK,
                TILE,
                TILE.few_rows,
                tl.float64,
                ACTIVATION,
            )
    return sum, shifted


@triton.jit
def sum_grad_xhat_of(sum, shifted, pivot, mean, inv_std):
    """Return sum(grad_z * xhat) from sums about the pivot."""
    return inv_std * (shifted + (pivot.to(tl.float64) - mean) * sum)


@triton.jit(do_not_specialize=["outer", "channels", "run_units", "tiles", "splits", "rows_per_split"])
def grad_sums_kernel(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    partials,
    param: tl.float64,
    outer,
    channels,
    run_units,
    tiles,
    splits,
    rows_per_split,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Sum a split of a tile into partials, [2, splits, channels]."""
    WALK = (outer, channels, run_units)
    tile, split, first_row, end_row = part_of_program(tiles, rows_per_split, WALK, TILE)
    channel, exists = channels_of(tile, WALK, TILE)
    inverse = load_or(inv_std, channel, exists, 1.0)
    gamma, beta = load_or(weight, channel, exists, 1.0), load_or(bias, channel, exists, 0.0)
    center = load_or(mean, channel, exists, 0.0)
    affine, pivot = affine_of(center, inverse, gamma, beta, TILE), pivot_of_grad_sums(center, inverse, TILE)
    tensors = (grad_out, input, residual, mask)
    sum, shifted = grad_sums_of_part(
        tensors, affine, pivot, inverse, number(param, TILE), tile, first_row, end_row, WALK, TILE, ACTIVATION
    )
    store_partials(partials, split, splits, channel, exists, channels, sum, shifted)


@triton.jit(do_not_specialize=["channels", "splits"])
def finish_grad_sums_kernel(
    partials,
    mean,
    inv_std,
    sum_grad,
    sum_grad_xhat,
    grad_weight,
    grad_bias,
    channels,
    splits,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write the sums of CHANNELS channels over all splits, and the gradients of weight and bias, as far as wanted."""
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exists = channel < channels
    sum, shifted = add_partials(partials, splits, channel, exists, channels, SPLITS)
    center, inverse = load_or(mean, channel, exists, 0.0), load_or(inv_std, channel, exists, 1.0)
    xhat = sum_grad_xhat_of(sum, shifted, pivot_of_grad_sums(center, inverse, TILE), center, inverse)
    save_grad_sums(channel, exists, sum, xhat, (sum_grad, sum_grad_xhat, grad_weight, grad_bias))


@triton.jit
def save_grad_sums(channel, exists, sum, xhat, outputs):
    """Store the sums of channels, and as the gradients of weight and bias, as far as wanted."""
    sum_grad, sum_grad_xhat, grad_weight, grad_bias = outputs
    store_channels(sum_grad, channel, exists, sum)
    store_channels(sum_grad_xhat, channel, exists, xhat)
    store_channels(grad_weight, channel, exists, xhat)
    store_channels(grad_bias, channel, exists, sum)
