"""A layer with an activation: what tools may read of it, and what would make them leave the activation out."""

from __future__ import annotations

import copy
import inspect
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbn
from fastbn.ops import activations
from tests.stock import CHANNELS, SHAPES, normal, pair

KINDS = [fastbn.BatchNorm2d, fastbn.FrozenBatchNorm2d, fastbn.BatchRenorm2d]


@pytest.mark.parametrize("name", ["eps", "num_features"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_replacement_needs_cannot_be_read(kind, name):
    layer = kind(3, activation="relu")
    sentence = (
        f"{kind.__name__}: expected a layer without an activation where {name} is read, got activation='relu'.*"
        r"fastbn\.fold.*fastbn\.convert.*fastbn\.reverted"
    )
    with pytest.raises(TypeError, match=sentence):
        getattr(layer, name)
    layer.activation = "none"
    assert getattr(layer, name) and name in dir(layer)
    layer.activation = None
    assert getattr(layer, name) == {"eps": 1e-5, "num_features": 3}[name]
    del vars(layer)[name]
    assert not hasattr(layer, name)


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_written(kind):
    """As models do it that set the eps of all layers."""
    layer, x = kind(CHANNELS, activation="relu", dtype=torch.float64).eval(), normal(*SHAPES[2])
    layer.eps = 0.5
    torch.testing.assert_close(layer(x), (x / 1.5**0.5).relu())
    assert "eps=0.5" in repr(layer) and copy.deepcopy(layer)(x).equal(layer(x))


def test_other_attributes_can_be_read():
    layer, plain = fastbn.BatchNorm2d(3, activation="relu"), fastbn.BatchNorm2d(3)
    assert isinstance(layer, nn.BatchNorm2d) and (layer.momentum, layer.affine) == (0.1, True)
    names = {name for name, _ in inspect.getmembers(layer)}
    assert {name for name, _ in inspect.getmembers(plain)} - names == {"eps", "num_features"}
    assert list(layer.state_dict()) == list(plain.state_dict())


def test_a_class_may_have_an_eps_of_its_own():
    class Mine(fastbn.BatchNorm2d):
        eps = property(lambda self: 2.0, lambda self, value: None)

    assert Mine(3, activation="relu").eps == 2.0


def test_the_signature_names_all_arguments():
    parameters = inspect.signature(fastbn.BatchNorm2d).parameters
    stock = inspect.signature(nn.BatchNorm2d).parameters
    assert list(parameters) == [*stock, "activation", "activation_param", "save"]
    assert all(parameters[name] == stock[name] for name in stock)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_classes_that_are_swapped_keep_the_values(activation):
    stock, _ = pair(eps=0.1)
    expected = stock.eval()(normal(*SHAPES[2]))
    layer = fastbn.convert(stock)
    layer.activation = activation
    expected = expected if activation is None else expected.relu()
    torch.testing.assert_close(layer(normal(*SHAPES[2])), expected)
    torch.testing.assert_close(fastbn.freeze(layer)(normal(*SHAPES[2])), expected)
    fastbn.unfreeze(layer).activation = None
    assert fastbn.revert(layer).eps == 0.1 and layer.num_features == CHANNELS


def _id(value):
    """Return an id that is the same in every process: a function's repr has its address."""
    return getattr(value, "__name__", str(value))


SPELLINGS = [
    ("ReLU", "relu", None),
    ("swish", "silu", None),
    ("hard_swish", "hardswish", None),
    ("LeakyReLU", "leaky_relu", None),
    ("none", None, None),
    ("Identity", None, None),
    (nn.ReLU(), "relu", None),
    (nn.ReLU, "relu", None),
    (nn.LeakyReLU(0.2), "leaky_relu", 0.2),
    (nn.LeakyReLU(), "leaky_relu", None),
    (nn.ELU(0.5), "elu", 0.5),
    (nn.Hardtanh(0, 6), "relu6", None),
    (nn.GELU(), "gelu", None),
    (nn.Identity(), None, None),
    (F.silu, "silu", None),
    (torch.relu, "relu", None),
    (None, None, None),
]


@pytest.mark.parametrize("given, name, param", SPELLINGS, ids=_id)
@pytest.mark.parametrize("kind", [*KINDS, fastbn.MaskedBatchNorm2d, fastbn.WhiteningBatchNorm2d, fastbn.SyncBatchNorm])
def test_an_activation_may_be_written_in_many_ways(kind, given, name, param):
    layer = kind(3, activation=given)
    assert (layer.activation, layer.activation_param) == (name, param)
    assert repr(layer) == repr(kind(3, activation=name, activation_param=param))


def test_the_function_takes_other_spellings():
    x = normal(*SHAPES[2], dtype=torch.float32)
    for given, name in (("ReLU", "relu"), ("swish", "silu"), ("hard-swish", "hardswish"), ("none", None)):
        outputs = (fastbn.functional.batch_norm(x, None, None, training=True, activation=a) for a in (given, name))
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "given, param, message",
    [
        ("relu7", None, "activation: expected one of none, relu.* got 'relu7'"),
        (nn.PReLU(), None, "activation: expected one of none, relu.* or torch's module of it, got PReLU"),
        (nn.GELU("tanh"), None, "got GELU"),
        (nn.Softplus(2.0), None, "got Softplus"),
        (torch.sin, None, "got <built-in method sin"),
        (7, None, "got 7"),
        (nn.LeakyReLU(0.2), 0.3, r"activation_param: expected None beside LeakyReLU\(negative_slope=0.2\)"),
        (nn.ReLU(), 0.3, "activation_param: expected None, since relu has no parameter, got 0.3"),
        (nn.Identity(), 0.3, "activation_param: expected None, since none has no parameter, got 0.3"),
    ],
    ids=_id,
)
def test_activations_that_the_ops_do_not_have(given, param, message):
    with pytest.raises(ValueError, match=message):
        fastbn.BatchNorm2d(3, activation=given, activation_param=param)


def test_editors_know_all_names():
    assert get_args(activations.Name) == activations.ACTIVATIONS
