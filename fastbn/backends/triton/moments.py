"""The statistics of channels: sums about a pivot, and mean, inv_std and running statistics from them.

All programs sum a channel about one pivot, so that their parts just add up, in float64. A part is summed in float32, of
which a lane adds up a few terms (`plans.MAX_STEPS`); and once more in float64 where that was not enough.
"""

import triton
import triton.language as tl

from fastbn.backends.triton.channels import (
    averaging_factor,
    count_of,
    inv_std_of,
    is_finite,
    moments_of,
    pivot_of,
    store_channels,
    update_running,
)
from fastbn.backends.triton.tile import channels_of, load, locate, part_of_program, run_of, sum_per_channel


@triton.jit
def shifted_sums(
    input, pivot, tile, first_row, end_row, WALK, TILE: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr
):
    """Return the sums per channel of d = x - pivot and of d * d over some rows of a tile, added up in the type SUM."""
    sum = tl.zeros([ROWS, TILE.vectors, 8], SUM)
    squares = tl.zeros([ROWS, TILE.vectors, 8], SUM)
    for row in range(first_row, end_row, ROWS):
        place = locate(row, tile, WALK, TILE, ROWS)
        d = tl.where(place[1], load(input, place, TILE).to(SUM) - pivot.to(SUM)[None], 0.0)
        sum += d
        squares += d * d
    return sum_per_channel(sum, TILE), sum_per_channel(squares, TILE)


@triton.jit
def is_enough(sum, squares, count):
    """Return whether float32 sums are as good as float64 ones, of all channels of a tile.

    They are not if one overflowed, or underflowed although its terms are not 0. Nor if the pivot lies more than 8
    standard deviations from the mean of the `count` elements, so that nearly all of the squares cancel; of few elements
    it may do so by chance, and they lose little.
    """
    resolved = is_finite(sum) & is_finite(squares) & ((squares >= 1e-30) | ((squares == 0) & (sum == 0)))
    cancels = (count >= 32) & (63 * squares * count < 64 * sum * sum)
    return tl.min((resolved & (cancels == 0)).to(tl.int32)) == 1


@triton.jit
def sums_of_part(input, pivot, tile, first_row, end_row, WALK, TILE: tl.constexpr):
    """Return `shifted_sums` of some rows of a tile in float32, or in float64 where that is not enough.

    The second time is so rare that it saves registers rather than time: by few rows at once.
    """
    if TILE.is_float64:
        sum, squares = shifted_sums(input, pivot, tile, first_row, end_row, WALK, TILE, TILE.rows, tl.float64)
    else:
        sum, squares = shifted_sums(input, pivot, tile, first_row, end_row, WALK, TILE, TILE.rows, tl.float32)
        count = tl.zeros([1, 1], tl.float64) + (end_row - first_row)
        if not TILE.by_rows:
            run, vectors_per_run = run_of(WALK, TILE)
            count = count * run / vectors_per_run
        if not is_enough(sum, squares, count):
            sum, squares = shifted_sums(input, pivot, tile, first_row, end_row, WALK, TILE, TILE.few_rows, tl.float64)
    return sum, squares


@triton.jit
def save_statistics(
    channel, exists, count, pivot, sum, squares, outputs, running, options, IS_CUMULATIVE: tl.constexpr
):
    """Store what is wanted of the statistics of channels, and move the running ones. Returns mean and inv_std.

    outputs: mean, inv_std, var. running: running_mean, running_var, batches including this one. options: momentum, eps.
    """
    mean_out, inv_std_out, var_out = outputs
    running_mean, running_var, batches = running
    momentum, eps = options
    mean, m2 = moments_of(count, pivot, sum, squares)
    var = m2 / count
    inv_std = inv_std_of(var, eps)
    store_channels(mean_out, channel, exists, mean)
    store_channels(inv_std_out, channel, exists, inv_std)
    store_channels(var_out, channel, exists, var)
    factor = averaging_factor(momentum, batches, IS_CUMULATIVE)
    update_running(running_mean, channel, exists, mean, factor)
    update_running(running_var, channel, exists, m2 / (count - 1.0), factor)  # unbiased; NaN for one element
    return mean, inv_std


@triton.jit(do_not_specialize=["outer", "channels", "run_units", "tiles", "splits", "rows_per_split"])
def moments_kernel(
    input, partials, counter, outer, channels, run_units, tiles, splits, rows_per_split, TILE: tl.constexpr
):
    """Sum a split of a tile into partials, [2, splits, channels]. The first program counts the batch."""
    if counter is not None:
        if tl.program_id(0) == 0:
            tl.store(counter, tl.load(counter) + 1)
    WALK = (outer, channels, run_units)
    tile, split, first_row, end_row = part_of_program(tiles, rows_per_split, WALK, TILE)
    channel, exists = channels_of(tile, WALK, TILE)
    pivot = pivot_of(input, channel, exists, WALK, TILE)
    sum, squares = sums_of_part(input, pivot, tile, first_row, end_row, WALK, TILE)
    store_partials(partials, split, splits, channel, exists, channels, sum, squares)


@triton.jit
def store_partials(partials, split, splits, channel, exists, channels, first, second):
    at = split.to(tl.int64) * channels + channel
    tl.store(partials + at, first, mask=exists)
    tl.store(partials + splits.to(tl.int64) * channels + at, second, mask=exists)


@triton.jit
def add_partials(partials, splits, channel, exists, channels, SPLITS: tl.constexpr):
    """Return the two sums of channels, [1, CHANNELS], over all splits, always in the same order."""
    first = tl.zeros([SPLITS, channel.shape[1]], tl.float64)
    second = tl.zeros([SPLITS, channel.shape[1]], tl.float64)
    for begin in range(0, splits, SPLITS):
        split = (begin + tl.arange(0, SPLITS))[:, None]
        at = split.to(tl.int64) * channels + channel
        wanted = (split < splits) & exists
        first += tl.load(partials + at, mask=wanted, other=0.0)
        second += tl.load(partials + splits.to(tl.int64) * channels + at, mask=wanted, other=0.0)
    return tl.sum(first, axis=0, keep_dims=True), tl.sum(second, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["outer", "channels", "run_units", "splits"])
def finish_moments_kernel(
    input,
    partials,
    mean,
    inv_std,
    var,
    running_mean,
    running_var,
    counter,
    momentum: tl.float64,
    eps: tl.float64,
    outer,
    channels,
    run_units,
    splits,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_CUMULATIVE: tl.constexpr,
):
    """Write the statistics of CHANNELS channels from the sums of all splits."""
    WALK = (outer, channels, run_units)
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exists = channel < channels
    sum, squares = add_partials(partials, splits, channel, exists, channels, SPLITS)
    pivot = pivot_of(input, channel, exists, WALK, TILE)
    batches = 0
    if IS_CUMULATIVE and counter is not None:
        batches = tl.load(counter)
    running = (running_mean, running_var, batches)
    outputs = (mean, inv_std, var)
    count = count_of(WALK, TILE)
    save_statistics(channel, exists, count, pivot, sum, squares, outputs, running, (momentum, eps), IS_CUMULATIVE)


@triton.jit
def count_kernel(counter):
    """Count a batch that no other kernel counts."""
    tl.store(counter, tl.load(counter) + 1)
