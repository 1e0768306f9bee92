"""output = activation((x - mean) * (weight * inv_std) + bias + residual), and the mask of its derivative."""

import triton
import triton.language as tl

from fastbn.backends.triton.activations import activate, is_upper
from fastbn.backends.triton.channels import affine_of, apply_affine, inv_std_of, load_or, store_channels
from fastbn.backends.triton.tile import channels_of, load, locate, number, part_of_program, store, store_mask


@triton.jit
def write_output(output, mask, residual, x, affine, param, place, TILE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Store the output of a tile's elements, and their mask if one is wanted."""
    z = apply_affine(x, affine)
    if residual is not None:
        z += load(residual, place, TILE)
    store(output, place, activate(z, param, ACTIVATION))
    if mask is not None:
        store_mask(mask, place, is_upper(z, ACTIVATION))


@triton.jit(do_not_specialize=["outer", "channels", "run_units", "tiles", "rows_per_split"])
def normalize_kernel(
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
    eps: tl.float64,
    param: tl.float64,
    outer,
    channels,
    run_units,
    tiles,
    rows_per_split,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Normalise by mean and inv_std; or by running statistics if there are any, which are saved there if wanted."""
    WALK = (outer, channels, run_units)
    tile, split, first_row, end_row = part_of_program(tiles, rows_per_split, WALK, TILE, BACKWARDS=True)
    channel, exists = channels_of(tile, WALK, TILE)
    if running_mean is not None:
        center = load_or(running_mean, channel, exists, 0.0)
        inverse = inv_std_of(load_or(running_var, channel, exists, 1.0), eps)
        if split == 0:
            store_channels(mean, channel, exists, center)
            store_channels(inv_std, channel, exists, inverse)
    else:
        center = load_or(mean, channel, exists, 0.0)
        inverse = load_or(inv_std, channel, exists, 1.0)
    gamma, beta = load_or(weight, channel, exists, 1.0), load_or(bias, channel, exists, 0.0)
    affine = affine_of(center, inverse, gamma, beta, TILE)
    for row in range(first_row, end_row, TILE.rows):
        place = locate(row, tile, WALK, TILE, TILE.rows)
        x = load(input, place, TILE)
        write_output(output, mask, residual, x, affine, number(param, TILE), place, TILE, ACTIVATION)
