"""hypothesis strategies of cases. The first of each list is the one that hypothesis shrinks to."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

from hypothesis import strategies as st

from fastbn.ops.activations import ACTIVATIONS
from tests import implementations
from tests.fuzz import exact
from tests.fuzz.case import DATA, OPERANDS, RUNNING, VECTORS, Case, Layout, channels_last
from tests.fuzz.hooks import HOOKS

# Sizes around the width of vectors and the 8 bits of a byte of the mask.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 255, 257, 1000, 1023)
DTYPES = ("float32", "float64", "bfloat16", "float16")
UNSUPPORTED = ("int32", "complex64", "int64", "bool", "uint8")
BACKWARD = ("once", "twice", "create graph", "none")
ODDITIES = (
    "unsupported dtype",
    "residual shape",
    "residual dtype",
    "weight size",
    "bias size",
    "bias dtype",
    "running_mean size",
    "running_var size",
    "no running_mean",
    "no running_var",
    "running_mean requires grad",
    "float counter",
    "strided weight",
    "strided bias",
    "strided running_mean",
    "strided running_var",
    "unknown activation",
    "other dimension",
)


@functools.cache
def weighted(*choices: tuple[int, object]) -> st.SearchStrategy:
    """Return a strategy of the values, each with its weight. Cached, since hypothesis takes long to make one."""
    return st.sampled_from([value for weight, value in choices for _ in range(weight)])


def _mostly(first: str, others: tuple[str, ...], absent: int = 0) -> st.SearchStrategy:
    """Return a strategy of `first`, twice as often as all others, and None, `absent` times as often."""
    rest = [(1, other) for other in others if other != first]
    return weighted((absent * len(rest), None), (2 * len(rest), first), *rest)


def _draw_labelled(draw, labels: Iterator[int], strategy: st.SearchStrategy):
    return draw(strategy, next(labels))


@functools.cache
def _sizes(room: int) -> st.SearchStrategy:
    return st.sampled_from([size for size in SIZES if size <= room])


_FLAG = weighted((2, True), (1, False))
_WANTED = weighted((3, True), (1, False))
_EMPTY = weighted((24, False), (1, True))
_UNSUPPORTED = st.sampled_from(UNSUPPORTED)
_DTYPES = st.sampled_from(DTYPES)
_ACTIVATIONS = st.sampled_from((None, *ACTIVATIONS[1:], "none"))
_PARAMS = weighted((4, None), (2, 0.2), (1, 0.1), (1, 1.0), (1, 0.5), (1, 0.0), (1, -0.5))
_THREADS = st.sampled_from((1, 2, 3))
_UNIT_STRIDES = st.sampled_from((7, 1, 0, 1000))
_SEED = st.integers(0, 2**16)


def _shape(draw, max_numel: int) -> tuple[int, ...]:
    dim = draw(weighted((12, 2), (10, 4), (8, 3), (6, 5), (1, 1), (1, 0)))
    room = draw(weighted((4, 256), (8, 1024), (4, 4096), (1, 65536)))
    room = min(room, max_numel)
    sizes = [1] * dim
    # Channels are drawn first: later dimensions have less room.
    for d in sorted(range(dim), key=lambda d: d != 1):
        sizes[d] = draw(_sizes(room))
        room //= sizes[d]
    if dim and draw(_EMPTY):
        sizes[draw(st.integers(0, dim - 1))] = 0
    return tuple(sizes)


def _layout(draw, shape: tuple[int, ...], kinds: tuple[tuple[int, str], ...]) -> Layout:
    dim = len(shape)
    kind = draw(weighted(*kinds))
    order = ()
    if kind == "channels_last" or (kind in ("sliced", "unaligned", "odd unit strides") and draw(_FLAG)):
        order = channels_last(dim).order if dim > 2 else ()
    if kind == "permuted":
        order = tuple(draw(st.permutations(range(dim))))
    offset = draw(st.integers(1, 9)) if kind == "unaligned" else 0
    steps = tuple(draw(_THREADS) for _ in range(dim)) if kind == "sliced" else ()
    if math.prod(steps) * math.prod(shape) > 100_000:
        steps = ()
    expanded = ()
    if kind == "expanded" and dim:
        expanded = tuple(sorted(draw(st.sets(st.integers(0, dim - 1), min_size=1))))
    if kind == "expanded everywhere":
        expanded = tuple(range(dim))
    unit_stride = draw(_UNIT_STRIDES) if kind == "odd unit strides" and 1 in shape else None
    return Layout(order, steps, expanded, offset, unit_stride)


_INPUT_LAYOUTS = (
    (12, "contiguous"),
    (12, "channels_last"),
    (4, "unaligned"),
    (3, "sliced"),
    (3, "permuted"),
    (1, "expanded"),
    (1, "odd unit strides"),
)
_OTHER_LAYOUTS = ((2, "contiguous"), (2, "channels_last"), (1, "unaligned"), (1, "sliced"), (1, "permuted"))
_GRAD_LAYOUTS = (*_OTHER_LAYOUTS, (1, "expanded"), (2, "expanded everywhere"))


@st.composite
def cases(draw, implementation: str, max_numel: int) -> Case:
    """Draw calls for an implementation, with inputs up to about `max_numel` elements."""
    # hypothesis writes draws of one label over each other, which would make five of six cases near copies of the sixth.
    draw = functools.partial(_draw_labelled, draw, itertools.count())
    oddity = draw(weighted((5 * len(ODDITIES), None), *((1, oddity) for oddity in ODDITIES)))
    shape = _shape(draw, max_numel)
    like = draw(_FLAG)  # residual and gradient in the layout of the input
    layout = _layout(draw, shape, _INPUT_LAYOUTS)
    dtype = draw(_UNSUPPORTED if oddity == "unsupported dtype" else _DTYPES)
    half = dtype in ("bfloat16", "float16")
    # float32 and float64 inputs refuse parameters of another type.
    param_dtype = draw(weighted((2, None), (2, "float32")) if half else weighted((30, None), (1, "bfloat16")))
    data, vector = _mostly("normal", DATA), _mostly("uniform", VECTORS, 1)
    training = draw(_FLAG)
    dense = not (layout.expanded or layout.unit_stride)
    backward = draw(weighted((8, "once"), (2, "twice"), (1, "none"), (2 * (dtype == "float64"), "create graph")))
    activation = "selu" if oddity == "unknown activation" else draw(_ACTIVATIONS)
    requires = tuple(name for name in OPERANDS if draw(_WANTED)) if backward != "none" else ()
    reference = weighted((12, None), (1, "reference"), (1, "cpu"))
    return Case(
        shape=shape,
        dtype=dtype,
        layout=layout,
        data=(draw(data), *((draw(data),) if draw(_FLAG) else ())),
        seed=draw(_SEED),
        param_dtype=param_dtype,
        weight=draw(vector),
        bias=draw(vector),
        running=draw(
            _mostly("initial", RUNNING, 1) if training else weighted((1, None), (9, "near"), *((1, r) for r in RUNNING))
        ),
        counter=draw(_FLAG),
        activation=activation,
        activation_param=draw(_PARAMS) if activation in exact.DEFAULT_PARAMS else None,
        residual=draw(_mostly("normal", DATA, 3)),
        residual_layout=layout if like and dense else _layout(draw, shape, _OTHER_LAYOUTS),
        training=training,
        momentum=draw(weighted((4, 0.1), (2, None), (1, 0.0), (1, 1.0), (1, -0.5), (1, 0.9))),
        eps=draw(weighted((12, 1e-5), (3, 1e-3), (2, 1e-12), (1, 0.0), (1, -1e-5))),
        requires=requires,
        grad_out=draw(data),
        grad_layout=layout if like and dense else _layout(draw, shape, _GRAD_LAYOUTS),
        hook=draw(weighted((16, None), *((1, hook) for hook in HOOKS))),
        threads=(draw(_THREADS), draw(_THREADS)),
        # Modules run on the backend that serves their input.
        api=draw(weighted((3, "functional"), (2, "module"))) if implementation == "cpu" else "functional",
        backend=draw(reference) if implementation == "cpu" else implementations.backend_name(implementation),
        backward=backward,
        grad_mode=draw(weighted((20, "grad"), (1, "no_grad"), (1, "inference_mode"))),
        oddity=oddity,
    )
