"""How a program walks a tensor: tiles of [rows, vectors, 8] elements, whose last dimension is contiguous in memory.

A tensor is [outer, channels, inner], and a run is what is contiguous: `inner` elements of one channel, or where `inner`
is 1 the channels of one row. Runs are cut into vectors of eight elements, each of which has a byte in the mask.

- Along channels (not TILE.by_rows): a tile has one channel. A row of it is one vector, and its rows are the vectors of
  all runs of the channel, one after the other. TILE.vectors is 1.
- By rows: a tile has 8 * TILE.vectors neighbouring channels, and a row of it is their part of a row of the tensor.

What is known per channel is a block [vectors, 8] in the one case and [1, 1] in the other, so that both broadcast
against the elements of a tile.

TILE is a constant of the kernel (`plans.Tile`). TILE.unit, a power of two up to 8, divides every run: it is all that
the compiler has to know of a size in order to load 16 bytes at a time, so no size needs a kernel of its own. The sizes
themselves are WALK, a tuple (outer, channels, run in units).
"""

import triton
import triton.language as tl


@triton.jit
def part_of_program(tiles, rows_per_split, WALK, TILE: tl.constexpr, BACKWARDS: tl.constexpr = False):
    """Return (tile, split, first row, end row) of this program. Neighbouring programs have neighbouring tiles.

    BACKWARDS: the first program has the last part, which a pass before this one has read last and left in L2.
    """
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    split = program // tiles
    tile = program - split * tiles
    if TILE.is_int64:
        first_row = split.to(tl.int64) * rows_per_split
        tile = tile.to(tl.int64)
    else:
        first_row = split * rows_per_split
    return tile, split, first_row, tl.minimum(first_row + rows_per_split, rows_of(WALK, TILE))


@triton.jit
def run_of(WALK, TILE: tl.constexpr):
    """Return the elements of a run, and the vectors that it is cut into."""
    _, _, run_units = WALK
    run = run_units * TILE.unit
    return run, (run + 7) // 8


@triton.jit
def rows_of(WALK, TILE: tl.constexpr):
    """Return the number of rows of a tile."""
    outer, _, _ = WALK
    rows = outer.to(tl.int64) if TILE.is_int64 else outer
    if not TILE.by_rows:
        _, vectors_per_run = run_of(WALK, TILE)
        rows = rows * vectors_per_run
    return rows


@triton.jit
def channels_of(tile, WALK, TILE: tl.constexpr):
    """Return (the channels of a tile, whether they exist), both [vectors, 8] or [1, 1]."""
    _, channels, _ = WALK
    if TILE.by_rows:
        channels, _ = run_of(WALK, TILE)  # the same number, of which the compiler knows a divisor
        channel = (tile * TILE.vectors + tl.arange(0, TILE.vectors))[:, None] * 8 + tl.arange(0, 8)[None, :]
    else:
        channel = tile + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :]
    return channel, channel < channels


@triton.jit
def locate(row, tile, WALK, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Return where the rows from `row` on are, as a tuple `place`: (offset, exists, byte, byte_exists).

    The first two are those of elements, [ROWS, vectors, 8], the last two those of bytes of the mask, [ROWS, vectors].
    """
    outer, channels, _ = WALK
    run, vectors_per_run = run_of(WALK, TILE)
    row = (row + tl.arange(0, ROWS))[:, None]
    if TILE.by_rows:
        index = row
        vector = tile * TILE.vectors + tl.arange(0, TILE.vectors)[None, :]
        byte_exists = (row < outer) & (vector < vectors_per_run)
    else:
        image = row // vectors_per_run
        index = image * channels + tile
        vector = row - image * vectors_per_run
        byte_exists = image < outer
    lane = tl.arange(0, 8)[None, None, :]
    offset = (index * run + vector * 8)[:, :, None] + lane
    if TILE.unit < 8:  # the last vector of a run may have fewer than eight elements
        exists = byte_exists[:, :, None] & ((vector * 8)[:, :, None] + lane < run)
    else:
        exists = byte_exists[:, :, None] & (lane < 8)
    return offset, exists, index * vectors_per_run + vector, byte_exists


@triton.jit
def load(tensor, place, TILE: tl.constexpr):
    """Load a tile's elements in the type that they are computed in; 0 where there are none."""
    offset, exists, _, _ = place
    return tl.load(tensor + offset, mask=exists, other=0.0).to(tl.float64 if TILE.is_float64 else tl.float32)


@triton.jit
def store(tensor, place, values):
    """Store a tile's elements in the tensor's dtype."""
    offset, exists, _, _ = place
    tl.store(tensor + offset, values.to(tensor.dtype.element_ty), mask=exists)


@triton.jit
def load_mask(mask, place):
    """Load the bits of a tile's elements: element i of a vector is bit i of its byte."""
    _, _, byte, byte_exists = place
    bits = tl.load(mask + byte, mask=byte_exists, other=0).to(tl.int32)
    return ((bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) != 0


@triton.jit
def store_mask(mask, place, bits):
    """Store the bits of a tile's elements; those of elements that do not exist are 0."""
    _, exists, byte, byte_exists = place
    bytes = tl.sum((bits & exists).to(tl.int32) << tl.arange(0, 8)[None, None, :], axis=2)
    tl.store(mask + byte, bytes.to(tl.uint8), mask=byte_exists)


@triton.jit
def sum_per_channel(x, TILE: tl.constexpr):
    """Return the float64 sums per channel of a tile's elements: [vectors, 8] or [1, 1]."""
    if TILE.by_rows:
        total = tl.sum(x.to(tl.float64), axis=0)
    else:
        of_vectors = tl.sum(x, axis=2)  # within a thread
        total = tl.sum(of_vectors.to(tl.float64), axis=0, keep_dims=True)
    return total


@triton.jit
def add_exactly(a, a_rest, b, b_rest):
    """Return a + b as a rounded sum and the rest that rounding lost (Knuth's TwoSum); rests just add up."""
    sum = a + b
    of_b = sum - a
    return sum, (a - (sum - of_b)) + (b - of_b) + (a_rest + b_rest)


@triton.jit
def exact_sum_per_channel(x, TILE: tl.constexpr):
    """Return `sum_per_channel` of elements that may cancel; NaN for inf.

    The eight of a vector, which are a thread's, are added up exactly in float32: to convert each of them, and on most
    GPUs to add it in float64, would take longer.
    """
    if TILE.by_rows or TILE.is_float64:
        total = sum_per_channel(x, TILE)
    else:
        sum, rest = tl.reduce((x, tl.zeros_like(x)), 2, add_exactly)
        total = tl.sum(sum.to(tl.float64) + rest.to(tl.float64), axis=0, keep_dims=True)
    return total


@triton.jit
def number(value, TILE: tl.constexpr):
    """Return a float argument in the type of elements. Arguments are float64, so that none loses digits on the way."""
    wide = tl.zeros([1, 1, 1], tl.float64) + value
    return wide.to(tl.float64 if TILE.is_float64 else tl.float32)
