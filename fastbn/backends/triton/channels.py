"""What is computed once per channel, in float64: pivots, moments, and the coefficients of elements.

The formulas are those of csrc/math: pivot.h, moments.h and affine.h. Blocks are [vectors, 8] or [1, 1] (tile.py).
"""

import triton
import triton.language as tl

from fastbn.backends.triton.tile import run_of


@triton.jit
def load_or(vector, channel, exists, default):
    """Load numbers of a vector that may be None, for which all are `default`."""
    if vector is not None:
        values = tl.load(vector + channel, mask=exists, other=default).to(tl.float64)
    else:
        values = tl.full(channel.shape, default, tl.float64)
    return values


@triton.jit
def store_channels(vector, channel, exists, values):
    """Store numbers into a vector of any dtype, or nothing into None."""
    if vector is not None:
        if vector.dtype.element_ty != tl.float64:
            values = values.to(tl.float32)  # and from there to a half type: no GPU converts float64 to those
        tl.store(vector + channel, values.to(vector.dtype.element_ty), mask=exists)


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit
def load_sample(input, channel, exists, i: tl.constexpr, WALK, TILE: tl.constexpr):
    """Load sample `i` of the pivot, or 0 for inf and NaN, about which every sum would be NaN."""
    outer, channels, _ = WALK
    run, _ = run_of(WALK, TILE)
    row = outer.to(tl.int64) * (2 * i + 1) // 10
    if TILE.by_rows:
        offset = row * run + channel
    else:
        offset = (row * channels + channel) * run + run.to(tl.int64) * (2 * i + 1) // 10
    x = tl.load(input + offset, mask=exists, other=0.0).to(tl.float64 if TILE.is_float64 else tl.float32)
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def pivot_of(input, channel, exists, WALK, TILE: tl.constexpr):
    """Return the median of five elements of each channel, spread over it and away from its ends.

    It is an outlier only if three of them are. Images are often padded, so that a first element may lie far from all
    others.
    """
    a = load_sample(input, channel, exists, 0, WALK, TILE)
    b = load_sample(input, channel, exists, 1, WALK, TILE)
    c = load_sample(input, channel, exists, 2, WALK, TILE)
    d = load_sample(input, channel, exists, 3, WALK, TILE)
    e = load_sample(input, channel, exists, 4, WALK, TILE)
    low = tl.maximum(tl.minimum(a, b), tl.minimum(c, d))
    high = tl.minimum(tl.maximum(a, b), tl.maximum(c, d))
    return tl.maximum(tl.minimum(low, high), tl.minimum(tl.maximum(low, high), e))


@triton.jit
def count_of(WALK, TILE: tl.constexpr):
    """Return the number of elements per channel, [1, 1]."""
    outer, _, _ = WALK
    count = tl.zeros([1, 1], tl.float64) + outer
    if not TILE.by_rows:
        run, _ = run_of(WALK, TILE)
        count = count * run
    return count


@triton.jit
def moments_of(count, pivot, sum, squares):
    """Return mean and m2, the sum of squared deviations from it, from the sums of d = x - pivot and of d * d."""
    offset = sum / count
    m2 = squares - sum * offset
    return pivot.to(tl.float64) + offset, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def inv_std_of(var, eps):
    return 1.0 / tl.sqrt(var + eps)


@triton.jit
def averaging_factor(momentum, batches, IS_CUMULATIVE: tl.constexpr):
    """Return the weight of the batch in the running statistics: `momentum`, or of a cumulative average 1 / batches.

    `batches` includes this one, and is 0 where they are not counted: then nothing moves.
    """
    if IS_CUMULATIVE:
        counted = tl.zeros([1, 1], tl.float64) + batches
        factor = tl.where(counted > 0, 1.0 / counted, 0.0)
    else:
        factor = tl.zeros([1, 1], tl.float64) + momentum
    return factor


@triton.jit
def update_running(running, channel, exists, batch, factor):
    """Move a running statistic, or none, towards that of the batch."""
    if running is not None:
        before = tl.load(running + channel, mask=exists, other=0.0).to(tl.float64)
        store_channels(running, channel, exists, (1.0 - factor) * before + factor * batch)


@triton.jit
def pivot_of_elements(mean, inv_std, TILE: tl.constexpr):
    """Return what is subtracted from elements, in the type that they are computed in: the rounded mean.

    It is 0 for data that span the range of float32, where differences from the mean could overflow.
    """
    if TILE.is_float64:
        pivot = mean
    else:
        size = tl.abs(mean)
        spans_the_range = (size > 1.2676506002282294e30) & (size * inv_std < 8)  # 2 ** 100
        pivot = tl.where(spans_the_range, 0.0, mean).to(tl.float32)
    return pivot


@triton.jit
def affine_of(mean, inv_std, weight, bias, TILE: tl.constexpr):
    """Return `affine`, the tuple (pivot, scale, shift) of

        z = (x - pivot) * scale + shift = (x - mean) * (weight * inv_std) + bias

    The difference from the rounded mean is exact where it matters, and shift has what the rounding lost. So no digits
    cancel where |mean| is far larger than the standard deviation, and a constant channel gives exactly its bias.
    """
    ACC: tl.constexpr = tl.float64 if TILE.is_float64 else tl.float32
    pivot = pivot_of_elements(mean, inv_std, TILE)
    scale = weight * inv_std
    shift = bias + (pivot.to(tl.float64) - mean) * scale
    return pivot[None], scale.to(ACC)[None], shift.to(ACC)[None]


@triton.jit
def apply_affine(x, affine):
    pivot, scale, shift = affine
    return (x - pivot) * scale + shift


@triton.jit
def grad_affine_of(mean, inv_std, weight, mean_grad, mean_grad_xhat, TILE: tl.constexpr):
    """Return `grad_affine`, the tuple (pivot, mean_grad, a, slope, rest, c) of

        ((grad_z - mean_grad) * a + ((x - pivot) * slope + rest)) * c
            = (grad_z - mean(grad_z) - xhat * mean(grad_z * xhat)) * (weight * inv_std)

    The difference comes first, so that a constant gradient cancels exactly. weight * inv_std is in a and in slope; but
    slope has inv_std twice, whose square leaves the range of float32 long before the gradient does. So for channels far
    from 1 it is in c, which costs a rounding and is 1 otherwise.
    """
    ACC: tl.constexpr = tl.float64 if TILE.is_float64 else tl.float32
    pivot = pivot_of_elements(mean, inv_std, TILE)
    rounded = mean_grad.to(ACC)
    is_far = (inv_std < 9.5367431640625e-07) | (inv_std > 1048576.0)  # 2 ** -20, 2 ** 20
    scale = weight * inv_std
    a = tl.where(is_far, 1.0, scale)
    slope = -a * inv_std * mean_grad_xhat
    rest = (pivot.to(tl.float64) - mean) * slope + (rounded.to(tl.float64) - mean_grad) * a
    c = tl.where(is_far, scale, 1.0)
    return pivot[None], rounded[None], a.to(ACC)[None], slope.to(ACC)[None], rest.to(ACC)[None], c.to(ACC)[None]


@triton.jit
def apply_grad_affine(grad_z, x, grad_affine):
    pivot, mean_grad, a, slope, rest, c = grad_affine
    return ((grad_z - mean_grad) * a + ((x - pivot) * slope + rest)) * c


@triton.jit
def pivot_of_grad_sums(mean, inv_std, TILE: tl.constexpr):
    """Return the pivot of sum(grad_z * (x - pivot)): the multiple of a power of two, about a sixteenth of a standard
    deviation, that is nearest to the mean.

    It has so few digits that x - pivot is exact for all but the smallest x. Rounding x - mean would shift all terms
    alike, which shows where they cancel. A mean that is a float32 number, as of equal elements, is its own pivot.
    """
    pivot = pivot_of_elements(mean, inv_std, TILE)
    if not TILE.is_float64:
        bits = (32.0 * inv_std).to(tl.int64, bitcast=True) & -0x10000000000000  # without the digits: a power of two
        steps = bits.to(tl.float64, bitcast=True)
        step = (0x7FE0000000000000 - bits).to(tl.float64, bitcast=True)  # 1 / steps
        scaled = mean * steps
        rounds_to_integer = 6755399441055744.0  # 1.5 * 2 ** 52
        nearest = ((scaled + rounds_to_integer) - rounds_to_integer) * step
        is_near = (tl.abs(scaled) < 2251799813685248.0) & (steps > 0) & (tl.abs(nearest) < 3.4e38)  # 2 ** 51
        is_taken = is_near & (pivot.to(tl.float64) != mean) & (pivot != 0)
        pivot = tl.where(is_taken, nearest.to(tl.float32), pivot)
    return pivot
