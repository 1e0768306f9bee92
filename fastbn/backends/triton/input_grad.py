"""grad_input = (grad_z - mean(grad_z) - xhat * mean(grad_z * xhat)) * (weight * inv_std), and grad_residual = grad_z.

With frozen statistics grad_input is grad_z * (weight * inv_std).
"""

import triton
import triton.language as tl

from fastbn.backends.triton.channels import affine_of, apply_grad_affine, count_of, grad_affine_of, load_or
from fastbn.backends.triton.grad_sums import load_grad_z
from fastbn.backends.triton.tile import channels_of, load, locate, number, part_of_program, store


@triton.jit
def write_gradients(grad_input, grad_residual, grad_z, x, affine, grad_affine, place, IS_FROZEN: tl.constexpr):
    """Store the gradients of a tile's elements, as far as wanted."""
    if grad_residual is not None:
        store(grad_residual, place, grad_z)
    if grad_input is not None:
        if IS_FROZEN:
            store(grad_input, place, grad_z * affine[1])  # the scale
        else:
            store(grad_input, place, apply_grad_affine(grad_z, x, grad_affine))


@triton.jit(do_not_specialize=["outer", "channels", "run_units", "tiles", "rows_per_split"])
def input_grad_kernel(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    sum_grad,
    sum_grad_xhat,
    count,
    grad_input,
    grad_residual,
    param: tl.float64,
    outer,
    channels,
    run_units,
    tiles,
    rows_per_split,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Write the gradients of elements from sums per channel; without any the statistics are frozen.

    count: over how many elements the sums are, None for those of this tensor.
    """
    WALK = (outer, channels, run_units)
    tile, _, first_row, end_row = part_of_program(tiles, rows_per_split, WALK, TILE, BACKWARDS=True)
    channel, exists = channels_of(tile, WALK, TILE)
    center, inverse = load_or(mean, channel, exists, 0.0), load_or(inv_std, channel, exists, 1.0)
    gamma, beta = load_or(weight, channel, exists, 1.0), load_or(bias, channel, exists, 0.0)
    affine = affine_of(center, inverse, gamma, beta, TILE)
    n = tl.load(count) if count is not None else count_of(WALK, TILE)
    mean_grad = load_or(sum_grad, channel, exists, 0.0) / n
    mean_grad_xhat = load_or(sum_grad_xhat, channel, exists, 0.0) / n
    grad_affine = grad_affine_of(center, inverse, gamma, mean_grad, mean_grad_xhat, TILE)
    slope = number(param, TILE)
    for row in range(first_row, end_row, TILE.rows):
        place = locate(row, tile, WALK, TILE, TILE.rows)
        x = load(input, place, TILE)
        grad_z = load_grad_z(grad_out, residual, mask, x, affine, slope, place, TILE, ACTIVATION)
        write_gradients(grad_input, grad_residual, grad_z, x, affine, grad_affine, place, sum_grad is None)
