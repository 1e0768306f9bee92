"""fastbn.LazyBatchNorm1d, 2d and 3d become fastbn's layers with their first input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastbn
from tests.stock import FAST, SHAPES, assert_same_buffers, normal, pair

LAZY = {1: fastbn.LazyBatchNorm1d, 2: fastbn.LazyBatchNorm2d, 3: fastbn.LazyBatchNorm3d}
TORCH = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("dim", SHAPES)
def test_the_first_input_makes_it_a_layer_of_fastbn(dim, options):
    x = normal(*SHAPES[dim])
    stock, fast = TORCH[dim](dtype=x.dtype, **options), LAZY[dim](dtype=x.dtype, **options)
    assert isinstance(fast, TORCH[dim]) and fast.has_uninitialized_params() == stock.has_uninitialized_params()
    torch.testing.assert_close(fast(x), stock(x))
    assert type(fast) is FAST[dim] and repr(fast) == repr(stock) and fast.num_features == x.shape[1]
    torch.testing.assert_close(fast(x + 1), stock(x + 1))
    assert_same_buffers(fast, stock)


def test_an_activation_and_a_residual():
    x, residual = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    lazy = fastbn.LazyBatchNorm2d(activation="leaky_relu", activation_param=0.3, dtype=x.dtype)
    ready = fastbn.BatchNorm2d(5, activation="leaky_relu", activation_param=0.3, dtype=x.dtype)
    torch.testing.assert_close(lazy(x, residual), ready(x, residual))
    assert type(lazy) is fastbn.BatchNorm2d and repr(lazy) == repr(ready) and lazy.activation == "leaky_relu"


def test_a_state_can_be_loaded_before_the_first_input():
    _, ready = pair()
    lazy = fastbn.LazyBatchNorm2d(dtype=torch.float64)
    lazy.load_state_dict(ready.state_dict())
    x = normal(*SHAPES[2])
    torch.testing.assert_close(lazy(x), ready(x))
    assert type(lazy) is fastbn.BatchNorm2d
