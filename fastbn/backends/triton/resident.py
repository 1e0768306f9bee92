"""Forward and backward in one launch that reads every tensor once: a program keeps a whole tile in its registers."""

import triton
import triton.language as tl

from fastbn.backends.triton import grad_sums, moments
from fastbn.backends.triton.channels import (
    affine_of,
    count_of,
    grad_affine_of,
    load_or,
    pivot_of,
    pivot_of_grad_sums,
)
from fastbn.backends.triton.grad_sums import load_grad_z, save_grad_sums, shifted_grad_sums, sum_grad_xhat_of
from fastbn.backends.triton.input_grad import write_gradients
from fastbn.backends.triton.moments import save_statistics, shifted_sums
from fastbn.backends.triton.normalize import write_output
from fastbn.backends.triton.tile import (
    channels_of,
    exact_sum_per_channel,
    load,
    locate,
    number,
    rows_of,
    sum_per_channel,
)


@triton.jit
def tile_of_program(TILE: tl.constexpr):
    tile = tl.program_id(0)
    return tile.to(tl.int64) if TILE.is_int64 else tile


@triton.jit(do_not_specialize=["outer", "channels", "run_units"])
def resident_forward_kernel(
    input,
    residual,
    output,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    running_mean,
    running_var,
    counter,
    momentum: tl.float64,
    eps: tl.float64,
    param: tl.float64,
    outer,
    channels,
    run_units,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_CUMULATIVE: tl.constexpr,
):
    """Normalise by the statistics of the batch and update the buffers.

    For a cumulative average every program reads the counter, so that none may count: `count_kernel` does so afterwards.
    """
    batches = 0
    if counter is not None:
        if IS_CUMULATIVE:
            batches = tl.load(counter) + 1
        elif tl.program_id(0) == 0:
            tl.store(counter, tl.load(counter) + 1)
    WALK = (outer, channels, run_units)
    tile = tile_of_program(TILE)
    place = locate(0, tile, WALK, TILE, TILE.rows)
    x = load(input, place, TILE)
    channel, channel_exists = channels_of(tile, WALK, TILE)
    pivot = pivot_of(input, channel, channel_exists, WALK, TILE)
    count = count_of(WALK, TILE)

    d = tl.where(place[1], x - pivot[None], 0.0)
    sum, squares = sum_per_channel(d, TILE), sum_per_channel(d * d, TILE)
    if not TILE.is_float64:
        if not moments.is_enough(sum, squares, count):
            rows = rows_of(WALK, TILE)
            sum, squares = shifted_sums(input, pivot, tile, 0, rows, WALK, TILE, TILE.few_rows, tl.float64)

    outputs, running = (mean, inv_std, None), (running_mean, running_var, batches)
    options = (momentum, eps)
    center, inverse = save_statistics(
        channel, channel_exists, count, pivot, sum, squares, outputs, running, options, IS_CUMULATIVE
    )
    gamma, beta = load_or(weight, channel, channel_exists, 1.0), load_or(bias, channel, channel_exists, 0.0)
    affine = affine_of(center, inverse, gamma, beta, TILE)
    write_output(output, mask, residual, x, affine, number(param, TILE), place, TILE, ACTIVATION)


@triton.jit(do_not_specialize=["outer", "channels", "run_units"])
def resident_backward_kernel(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    grad_input,
    grad_weight,
    grad_bias,
    grad_residual,
    param: tl.float64,
    outer,
    channels,
    run_units,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_FROZEN: tl.constexpr,
):
    """Write all gradients that are wanted."""
    WALK = (outer, channels, run_units)
    tile = tile_of_program(TILE)
    channel, channel_exists = channels_of(tile, WALK, TILE)
    center, inverse = load_or(mean, channel, channel_exists, 0.0), load_or(inv_std, channel, channel_exists, 1.0)
    gamma, beta = load_or(weight, channel, channel_exists, 1.0), load_or(bias, channel, channel_exists, 0.0)
    affine = affine_of(center, inverse, gamma, beta, TILE)
    slope = number(param, TILE)
    place = locate(0, tile, WALK, TILE, TILE.rows)
    x = load(input, place, TILE)
    grad_z = load_grad_z(grad_out, residual, mask, x, affine, slope, place, TILE, ACTIVATION)

    sum = exact_sum_per_channel(grad_z, TILE)
    pivot = pivot_of_grad_sums(center, inverse, TILE)
    shifted = exact_sum_per_channel(grad_z * tl.where(place[1], x - pivot[None], 0.0), TILE)
    if not TILE.is_float64:
        if not grad_sums.is_enough(sum, shifted, inverse):
            tensors, rows = (grad_out, input, residual, mask), rows_of(WALK, TILE)
            sum, shifted = shifted_grad_sums(
                tensors, affine, pivot, slope, tile, 0, rows, WALK, TILE, TILE.few_rows, tl.float64, ACTIVATION
            )
    xhat = sum_grad_xhat_of(sum, shifted, pivot, center, inverse)
    save_grad_sums(channel, channel_exists, sum, xhat, (None, None, grad_weight, grad_bias))

    count = count_of(WALK, TILE)
    grad_affine = grad_affine_of(center, inverse, gamma, sum / count, xhat / count, TILE)
    write_gradients(grad_input, grad_residual, grad_z, x, affine, grad_affine, place, IS_FROZEN)
