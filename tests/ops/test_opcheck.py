"""torch.library.opcheck on every op: schema, fake tensors, autograd registration, AOT dispatch."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastbn.backends import reference
from fastbn.ops import contract
from fastbn.testing import cases
from tests import implementations

LAYOUTS = {
    # Runs of 12 elements: the mask of one is two bytes, of which the second is half used.
    "4d": cases.Case("4d", (3, 5, 4, 3)),
    "channels_last": cases.Case("channels_last", (3, 5, 4, 2), "channels_last"),
    "2d": cases.Case("2d", (9, 5)),
    # Dense, but in neither format: outputs have other strides.
    "transposed": cases.Case("transposed", (3, 5, 4, 2), "transposed"),
    "sliced": cases.Case("sliced", (3, 5, 4, 2), "sliced"),
    "empty": cases.Case("empty", (0, 5, 2, 2)),
}
# dtype, parameters' dtype, residual, activation
OPTIONS = (
    (torch.float32, torch.float32, False, 0),
    (torch.float64, torch.float64, True, 1),
    (torch.bfloat16, torch.float32, True, 5),
    (torch.float16, torch.float16, False, 3),
)


NAMESPACES = {"cpu": "fastbn", "emulator": "fastbn_emulator", "triton": "fastbn_triton"}


@pytest.fixture(scope="module", params=implementations.params(*NAMESPACES))
def registered(request):
    implementations.load(request.param)
    return getattr(torch.ops, NAMESPACES[request.param])


def _samples(case, dtype, param_dtype, residual, activation):
    """Return arguments of every op for one input, by name of the op."""
    x, r, g = cases.make_input(case, dtype), cases.make_normal(case, dtype), cases.make_normal(case, dtype, seed=2)
    r = r if residual else None
    vector = lambda seed: cases.make_vector(case.channels, param_dtype, "cpu", seed, 0.5, 1.5)  # noqa: E731
    weight, bias = vector(1), vector(2)
    mean, var = reference.channel_stats(x)
    inv_std, counter = (var + 1).rsqrt(), torch.tensor(1)
    upper = cases.make_normal(case, torch.float32, seed=3) > 0
    mask = reference.pack_mask(upper, reference.suggest_memory_format(x)) if residual and activation == 1 else None
    backward = (g, x, None if mask is not None else r, mask, weight, bias, mean, inv_std)
    sums = (mean, inv_std, torch.ones(1, dtype=torch.float64))
    return {
        "batch_norm_train": [
            (x, r, weight, bias, vector(3), vector(4), counter, 0.1, 1e-5, activation, True),
            (x, r, None, None, None, None, None, None, 1e-5, activation, False),
        ],
        "batch_norm_eval": [(x, r, weight, None, vector(3), vector(4), 1e-5, activation)],
        "batch_norm_frozen": [
            (x, r, weight, None, vector(3), vector(4), 1e-5, activation, save) for save in (True, False)
        ],
        "batch_norm_backward": [
            (*backward, batch, activation, *flags)
            for batch, flags in ((True, [True] * 4), (False, [True, False, True, False]), (True, [False, True] * 2))
        ],
        "channel_stats": [(x,)],
        "normalize": [(x, r, None, bias, mean, inv_std, activation, save) for save in (True, False)],
        "grad_sums": [(*backward, activation)],
        "input_grad": [(*backward, *sums, activation, True), (*backward, None, None, None, activation, False)],
    }


# Each layout, and each option with a residual under both memory formats.
SAMPLES = [
    ("4d", 1),
    ("channels_last", 2),
    pytest.param("channels_last", 1, marks=pytest.mark.slow),
    pytest.param("2d", 3, marks=pytest.mark.slow),
    pytest.param("transposed", 0, marks=pytest.mark.slow),
    ("sliced", 2),
    pytest.param("empty", 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout,option", SAMPLES)
@pytest.mark.parametrize("op", contract.OPS)
def test_op(registered, op, layout, option):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if registered is torch.ops.fastbn and layout != "empty":  # the slow check, which does not depend on the kernels
        utils.append("test_aot_dispatch_dynamic")
    for arguments in _samples(LAYOUTS[layout], *OPTIONS[option])[op]:
        torch.library.opcheck(getattr(registered, op).default, arguments, test_utils=utils)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_results_have_the_strides_of_real_ones(registered, layout):
    for options, op in itertools.product(OPTIONS, contract.OPS):
        for arguments in _samples(LAYOUTS[layout], *options)[op]:
            meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
            results = (getattr(registered, op)(*operands) for operands in (arguments, meta))
            for real, fake in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in results), strict=True):
                assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype), op
