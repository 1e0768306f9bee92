"""Callers that replace or wrap torch functions: __torch_function__, inference tensors, batches of gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.overrides import TorchFunctionMode

import fastbn
from fastbn.ops.activations import ACTIVATIONS
from tests.stock import normal, pair


def _calls_of(forward, record):
    """Return the calls of F.batch_norm that an override saw, as (shapes or values by position, the same by name)."""
    record.clear()
    forward()
    describe = lambda a: tuple(a.shape) if isinstance(a, Tensor) else a  # noqa: E731
    return [([describe(a) for a in args], {k: describe(v) for k, v in kwargs.items()}) for args, kwargs in record]


class _Subclass(Tensor):
    record: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            cls.record.append((args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.record = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            self.record.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["input", "weight", "residual", "mode"])
def test_an_override_sees_what_it_sees_of_torchs_layer(kind, training):
    stock, fast = pair(dtype=torch.float64)
    x, r = normal(3, 5, 4, 6), normal(3, 5, 4, 6, seed=1)
    seen = []
    for layer in (stock.train(training), fast.train(training)):
        record = _Subclass.record
        given = x.as_subclass(_Subclass) if kind == "input" else x
        if kind == "weight":
            del layer.weight
            layer.weight = torch.ones(5, dtype=torch.float64).as_subclass(_Subclass)
        residual = r.as_subclass(_Subclass) if kind == "residual" else r

        def forward(layer=layer, given=given, residual=residual):
            return layer(given, residual) if layer is fast else layer(given) + residual

        if kind == "mode":
            with _Mode() as mode:
                seen.append(_calls_of(forward, mode.record))
        else:
            seen.append(_calls_of(forward, record))
        assert type(forward()) is (Tensor if kind == "mode" else _Subclass)
    assert seen[0] == seen[1] and len(seen[0]) == (kind != "residual")
    torch.testing.assert_close(dict(fast.named_buffers()), dict(stock.named_buffers()))


class _Returns(Tensor):
    """An override that implements batch_norm by another function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "mine" if func is F.batch_norm else super().__torch_function__(func, types, args, kwargs or {})


def test_an_override_may_implement_batch_norm():
    x = torch.zeros(2, 3).as_subclass(_Returns)
    assert fastbn.BatchNorm1d(3)(x) == nn.BatchNorm1d(3)(x) == "mine"


def test_a_default_device_is_no_override():
    """torch.set_default_device is a mode, which must not keep the layers of its users from the kernels."""
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    with torch.device("cpu"):
        assert "BatchNormFunction" in fastbn.BatchNorm2d(5)(x).grad_fn.name()
        assert fastbn.explain(x).backend == "cpu"
    with _Mode():
        assert "BatchNormFunction" not in fastbn.BatchNorm2d(5)(x).grad_fn.name()
        assert "__torch_function__" in fastbn.explain(x).reason


OPERANDS = ("input", "residual", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _operands(inference: str, wants_grad: bool) -> dict[str, Tensor]:
    values = (normal(3, 5, 4), normal(3, 5, 4, seed=1), *(torch.ones(5).double() for _ in range(4)), torch.tensor(2))
    operands = dict(zip(OPERANDS, values, strict=True))
    with torch.inference_mode():
        operands[inference] = operands[inference].clone()
    if wants_grad:
        for name in ("input", "weight"):
            if name != inference:
                operands[name].requires_grad_()
    return operands


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("wants_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("inference", OPERANDS)
def test_inference_tensors(inference, training, wants_grad, activation):
    """fastbn refuses what torch's layer, addition and activation refuse, in their words and before any buffer has
    moved.
    """
    outcomes = []
    for fast in (False, True):
        given = _operands(inference, wants_grad)
        before = {name: given[name].clone() for name in OPERANDS[4:]}
        x, residual, counter = given.pop("input"), given.pop("residual"), given.pop("num_batches_tracked")
        try:
            if fast:
                y = fastbn.functional.batch_norm(
                    x, **given, training=training, residual=residual, activation=activation, num_batches_tracked=counter
                )
            else:
                if training:
                    counter.add_(1)
                y = F.batch_norm(x, **given, training=training) + residual
                y = y if activation is None else getattr(F, activation)(y)
            outcomes.append(y)
        except RuntimeError as error:
            outcomes.append(str(error))
            if fast:
                after = {"num_batches_tracked": counter, **given}
                torch.testing.assert_close({name: after[name] for name in before}, before)
    if isinstance(outcomes[0], str):
        assert outcomes[1] == outcomes[0]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0])


GRADIENTS = list(itertools.product(ACTIVATIONS, (True, False), (True, False), ("2d", "contiguous", "channels_last")))


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("jacobian", marks=pytest.mark.slow),
        pytest.param("hessian", marks=pytest.mark.slow),
        "batched",
        "batched_permuted",
    ],
)
@pytest.mark.parametrize("wants_weight", [True, False], ids=["affine", "frozen_affine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batches_of_gradients(training, wants_weight, what):
    """vectorize=True of torch.autograd.functional and is_grads_batched=True of torch.autograd.grad work."""
    for activation, residual, tracks, layout in GRADIENTS:
        if not training and not tracks:
            continue
        shape = (4, 3) if layout == "2d" else (3, 2, 2, 2)
        x, r = normal(*shape), normal(*shape, seed=1) if residual else None
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = (
            t.requires_grad_(wants_weight) for t in torch.linspace(0.5, 2, 2 * shape[1]).double().view(2, -1)
        )
        statistics = tuple(torch.linspace(0.5, 2, 2 * shape[1]).double().view(2, -1)) if tracks else (None, None)

        def stock(x, s=statistics, w=weight, b=bias, r=r, a=activation):
            z = F.batch_norm(x, *(t if t is None else t.clone() for t in s), w, b, training)
            z = z if r is None else z + r
            if a == "hardsigmoid" and what == "hessian":  # of which torch has no second derivative
                return (z + 3).clamp(0, 6) / 6
            return z if a == "none" else getattr(F, a)(z)

        def fast(x, s=statistics, w=weight, b=bias, r=r, a=activation):
            s = (t if t is None else t.clone() for t in s)
            return fastbn.functional.batch_norm(x, *s, w, b, training, residual=r, activation=a)

        results = [_batched(f, x, what) for f in (fast, stock)]
        message = f"{activation}, {residual=}, {tracks=}, {layout}"
        torch.testing.assert_close(*results, msg=lambda text, message=message: f"{message}: {text}")


def _batched(function, x, what):
    if what == "jacobian":
        return jacobian(function, x, vectorize=True)
    if what == "hessian":
        return hessian(lambda x: function(x).pow(3).sum(), x, vectorize=True)
    grad_outs = normal(2, *x.shape, seed=2)
    if what == "batched_permuted":
        grad_outs = grad_outs.transpose(1, -1).contiguous().transpose(1, -1)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, grad_outs, is_grads_batched=True)[0]
