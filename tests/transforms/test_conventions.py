"""Layers of other libraries as torch's: names, momentum and variance, by a worked example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastbn.transforms import CONVENTIONS, batch_norm_arguments, batch_norm_state

EPS = 1e-3


class _KerasLayer:
    """What keras.layers.BatchNormalization computes of (N, C), in float64, by the formulas of its documentation."""

    def __init__(self, channels, momentum):
        self.momentum, self.gamma, self.beta = momentum, np.linspace(0.5, 2, channels), np.linspace(-1, 1, channels)
        self.moving_mean, self.moving_variance = np.zeros(channels), np.ones(channels)

    def train(self, x):
        for name, batch in (("moving_mean", x.mean(0)), ("moving_variance", x.var(0))):
            setattr(self, name, getattr(self, name) * self.momentum + batch * (1 - self.momentum))

    def predict(self, x):
        return self.gamma * (x - self.moving_mean) / np.sqrt(self.moving_variance + EPS) + self.beta

    def weights(self, path):
        return {path + name: getattr(self, name) for name in ("gamma", "beta", "moving_mean", "moving_variance")}


def _batches():
    return np.random.default_rng(0).normal(1, 2, (5, 8, 3))


def test_a_keras_layer_goes_on_in_torch():
    there = _KerasLayer(3, momentum=0.9)
    here = nn.BatchNorm1d(3, **batch_norm_arguments("keras", momentum=0.9, eps=EPS), dtype=torch.float64)
    assert (here.momentum, here.eps) == (pytest.approx(0.1), EPS)
    first, *rest = _batches()
    there.train(first)
    state = batch_norm_state(there.weights("model/bn/"), "keras")
    here.load_state_dict({name.removeprefix("model.bn."): value for name, value in state.items()})
    x = rest[0]
    torch.testing.assert_close(here.eval()(torch.from_numpy(x)), torch.from_numpy(there.predict(x)))
    here.train()
    for batch in rest:
        there.train(batch)
        here(torch.from_numpy(batch))
    torch.testing.assert_close(here.running_mean, torch.from_numpy(there.moving_mean))


def test_the_worked_example():
    """The numbers of docs/variants.md."""
    batch = np.array([[1.0], [3], [5], [7]])
    there, here = _KerasLayer(1, momentum=0.9), nn.BatchNorm1d(1, momentum=0.1, dtype=torch.float64)
    there.train(batch)
    here(torch.from_numpy(batch))
    assert (there.moving_mean.item(), there.moving_variance.item()) == pytest.approx((0.4, 1.4))
    assert (here.running_mean.item(), here.running_var.item()) == pytest.approx((0.4, 0.9 + 2 / 3))


def test_elements_make_the_variance_what_torch_would_have():
    """With an unbiased start, and n elements in each batch, torch's average is n / (n - 1) times the biased one."""
    there, here = _KerasLayer(3, momentum=0.8), nn.BatchNorm1d(3, momentum=0.2, dtype=torch.float64)
    there.moving_variance = here.running_var.numpy() * 7 / 8
    for batch in _batches():
        there.train(batch)
        here(torch.from_numpy(batch))
    weights = there.weights("bn/")
    for elements in (8, {"bn": 8}):
        state = batch_norm_state(weights, "keras", elements=elements)
        torch.testing.assert_close(state["bn.running_var"], here.running_var)
    assert np.array_equal(batch_norm_state(weights, "keras")["bn.running_var"], there.moving_variance)
    unbiased = batch_norm_state(weights, "keras_fused", elements=8)
    assert np.array_equal(unbiased["bn.running_var"], there.moving_variance)


@pytest.mark.parametrize(
    "convention,arrays,names",
    [
        ("keras", {"a/bn/moving_mean:0": 1, "a/bn/moving_variance:0": 2, "a/bn/gamma:0": 3, "a/bn/beta:0": 4}, "a.bn."),
        ("keras", {"moving_mean": 1, "moving_variance": 2, "gamma": 3, "beta": 4, "conv/kernel": 5}, ""),
        (
            "flax",
            {
                ("batch_stats", "BatchNorm_0", "mean"): 1,
                ("batch_stats", "BatchNorm_0", "var"): 2,
                ("params", "BatchNorm_0", "scale"): 3,
                ("params", "BatchNorm_0", "bias"): 4,
                ("params", "LayerNorm_0", "scale"): 5,
            },
            "BatchNorm_0.",
        ),
        ("onnx", {"n.input_mean": 1, "n.input_var": 2, "n.scale": 3, "n.B": 4}, "n."),
        ("torch", {"n.running_mean": 1, "n.running_var": 2, "n.weight": 3, "n.bias": 4, "w.weight": 5}, "n."),
    ],
)
def test_names(convention, arrays, names):
    state = batch_norm_state({path: np.full(2, value, np.float32) for path, value in arrays.items()}, convention)
    values = {name: value.tolist() for name, value in state.items()}
    expected = {"weight": 3, "bias": 4, "running_mean": 1, "running_var": 2}
    assert values == {names + name: [value] * 2 for name, value in expected.items()}
    assert all(value.dtype == torch.float32 for value in state.values())


def test_a_layer_without_scale_and_centre():
    state = batch_norm_state({"moving_mean": torch.ones(3), "moving_variance": torch.ones(3)}, "keras")
    layer = nn.BatchNorm1d(3)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0 and layer.weight.tolist() == [1] * 3 and layer.bias.tolist() == [0] * 3


def test_a_convention_of_ones_own():
    biased = CONVENTIONS["torch"]._replace(is_biased=True)
    state = batch_norm_state({"running_mean": torch.zeros(1), "running_var": torch.ones(1)}, biased, elements=5)
    assert state["running_var"].item() == 1.25


@pytest.mark.parametrize("name", CONVENTIONS)
def test_defaults(name):
    known = CONVENTIONS[name]
    arguments = batch_norm_arguments(name)
    assert arguments["eps"] == known.eps
    moved = known.momentum * 3.0 + (1 - known.momentum) * 5.0 if known.is_decay else 3.0 + known.momentum * 2.0
    assert (1 - arguments["momentum"]) * 3.0 + arguments["momentum"] * 5.0 == pytest.approx(moved)


def test_arguments_outside():
    stats = {"moving_mean": torch.ones(1), "moving_variance": torch.ones(1)}
    for call, message in (
        (lambda: batch_norm_arguments("caffeine"), "convention: expected one of torch, keras, .*, got 'caffeine'"),
        (lambda: batch_norm_arguments("keras", momentum=1.5), "momentum: expected a number from 0 to 1, got 1.5"),
        (lambda: batch_norm_state({"x/gamma": 1}, "keras"), "expected arrays moving_mean and moving_variance of a la"),
        (lambda: batch_norm_state(stats, "keras", elements=1), "elements: expected at least 2 per channel, got 1 for "),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_numbers_of_elements():
    arrays = {"bn/moving_mean": np.zeros(1), "bn/moving_variance": np.ones(1)}
    for elements in (np.int64(5), {"bn": np.int32(5), "other": 3}):
        assert batch_norm_state(arrays, "keras", elements=elements)["bn.running_var"].item() == 1.25
    for elements, error, message in (
        ({}, ValueError, "elements: expected a number for every layer, got none for bn"),
        (8.0, TypeError, "elements: expected whole numbers, got float for bn"),
        ({"bn": "8"}, TypeError, "elements: expected whole numbers, got str for bn"),
        ({"bn": np.int64(1)}, ValueError, "elements: expected at least 2 per channel, got 1 for bn"),
    ):
        with pytest.raises(error, match=message):
            batch_norm_state(arrays, "keras", elements=elements)


@pytest.mark.parametrize("make", [np.ones, lambda n: nn.Parameter(torch.ones(n))], ids=["numpy", "torch"])
def test_the_state_is_a_copy(make):
    names = "gamma", "beta", "moving_mean", "moving_variance"
    arrays = {name: make(2) for name in names}
    state = batch_norm_state(arrays, "keras")
    for value in state.values():
        assert not value.requires_grad
        value.add_(1)
    assert [array.tolist() for array in arrays.values()] == [[1, 1]] * 4
