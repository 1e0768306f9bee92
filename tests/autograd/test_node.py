"""The C++ node of csrc/node: when it is used, and what of it only shows outside of the other tests of this folder."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn import functional
from fastbn.backends import node
from tests.stock import normal


@pytest.fixture
def node_or_function():
    """Override the fixture of conftest.py: these tests choose themselves."""


def test_it_was_built_for_this_torch():
    assert node.DESCRIPTION == f"yes: {node.module_name()}"
    assert fastbn.info()["runs here"]["C++ autograd node"] == node.DESCRIPTION


def test_another_torch_does_not_get_it(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+xpu")
    assert node.module_name() == "fastbn._node_2_99_0_xpu"
    extension, description = node.load()
    assert extension is None and description.startswith("no: fastbn._node_2_99_0_xpu was not built")


def test_one_that_cannot_be_loaded_is_not_missed(monkeypatch):
    def fails(name):
        raise ImportError("undefined symbol: torch")

    monkeypatch.setattr(importlib, "import_module", fails)
    assert node.load() == (None, "no: undefined symbol: torch")


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FASTBN_NODE", "0")
    assert node.load() == (None, "no: FASTBN_NODE=0")
    monkeypatch.setenv("FASTBN_NODE", "1")
    assert node.load() == (importlib.import_module(node.module_name()), node.DESCRIPTION)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_profiler_sees_the_ops(training):
    layer = fastbn.BatchNorm1d(3, dtype=torch.float64).train(training)
    x = normal(4, 3, 5).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    kinds = ("train", "train", "backward") if training else ("frozen", "eval", "backward")
    seen = sorted(event.name for event in profile.events() if event.name.startswith("fastbn::"))
    assert seen == sorted(f"fastbn::batch_norm_{kind}" for kind in kinds)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mode_sees_the_ops(training):
    layer = fastbn.BatchNorm1d(3, dtype=torch.float64).train(training)
    x = normal(4, 3, 5).requires_grad_()
    with _Calls() as calls:
        layer(x).sum().backward()
    assert len(calls.of_backward) == 1
    y = layer(x)
    with _Calls() as calls:
        y.sum().backward()
    assert len(calls.of_backward) == 1


@pytest.mark.parametrize(
    "training, backend, expected",
    [(True, None, True), (False, None, True), (True, "cpu", False), (True, "reference", False)],
)
def test_calls_that_it_takes(training, backend, expected):
    x = normal(4, 3, 5).requires_grad_()
    vectors = torch.zeros(3).double(), torch.ones(3).double()
    y = fastbn.functional.batch_norm(x, *vectors, training=training, backend=backend)
    assert (type(y.grad_fn).__name__ == "CppFunction") == expected
    assert "BatchNormFunction" in y.grad_fn.name()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("adds", [True, False], ids=["residual", "no_residual"])
def test_calls_that_are_not_recorded(training, adds, monkeypatch):
    """They go through it too, keep nothing, and move statistics as the op does that Python calls."""
    results = []
    for extension in (node.NODE, None):
        monkeypatch.setattr(functional, "NODE", extension)
        layer = fastbn.BatchNorm1d(3, activation="relu", dtype=torch.float64).train(training)
        layer.running_var.fill_(2)
        operands = (normal(4, 3, 5), normal(4, 3, 5, seed=1)) if adds else (normal(4, 3, 5),)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("a tensor is saved"), lambda t: t):
            with torch.no_grad():
                outputs = [layer(*operands)]
            with torch.inference_mode():
                outputs.append(layer(*operands))
        assert outputs[0].grad_fn is None and not outputs[0].is_inference() and outputs[1].is_inference()
        results.append([*outputs, *layer.buffers()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_graph_is_walked_once():
    x = normal(4, 3, 5).requires_grad_()
    y = fastbn.functional.batch_norm(x, None, None, training=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_changed_operands_are_noticed():
    x = normal(4, 3, 5).requires_grad_()
    for index in range(2):
        operands = [(x * 1.0), torch.ones(3).double().requires_grad_()]
        y = fastbn.functional.batch_norm(operands[0], None, None, operands[1], training=True)
        with torch.no_grad():
            operands[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.of_backward = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        if function is torch.ops.fastbn.batch_norm_backward.default:
            self.of_backward.append(args)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
def test_a_mode_sees_the_same_backward(has_weight, training, monkeypatch):
    seen = []
    for extension in (node.NODE, None):
        monkeypatch.setattr(functional, "NODE", extension)
        weight, bias = normal(3).requires_grad_() if has_weight else None, normal(3).requires_grad_()
        statistics = torch.zeros_like(bias), torch.ones_like(bias)
        y = fastbn.functional.batch_norm(normal(4, 3, 5), *statistics, weight, bias, training)
        with _Calls() as calls:
            y.sum().backward()
        seen.append(calls.names)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(
    "given, wanted",
    [
        (given, name)
        for given in ("input residual", "input residual bias", "input weight bias")
        for name in given.split()
    ],
)
def test_only_what_is_asked_for_is_computed(given, wanted, activation):
    values = dict(zip(("input", "residual"), (normal(4, 3, 5), normal(4, 3, 5, seed=1)), strict=True))
    values |= {"weight": normal(3, seed=2), "bias": normal(3, seed=3)}
    operands = {name: values[name].requires_grad_() for name in given.split()}
    x, r, w, b = (operands.get(name) for name in values)
    y = fastbn.functional.batch_norm(x, None, None, w, b, True, residual=r, activation=activation)
    with _Calls() as calls:
        (grad,) = torch.autograd.grad(y.square().sum(), operands[wanted])
    assert grad.shape == operands[wanted].shape
    (args,) = calls.of_backward
    needs = [name == wanted for name in ("input", "weight", "bias", "residual")]
    needs[3] = needs[3] and activation != "none"  # it is grad_out
    assert list(args[10:14]) == needs


def test_compiled_autograd():
    """torch's compiler may trace the backward of a forward that ran eagerly."""
    results = []
    for compiled in (False, True):
        layer = fastbn.BatchNorm1d(3, activation="silu", dtype=torch.float64)
        x = normal(4, 3, 5).requires_grad_()
        loss = layer(x).square().sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        results.append((x.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(*results)


def test_gradients_are_those_of_torch():
    x, r, grad_out = (normal(6, 5, 7, seed=seed).requires_grad_() for seed in range(3))
    weight, bias = (normal(5, seed=seed).requires_grad_() for seed in (3, 4))
    leaves = x, r, weight, bias
    y = fastbn.functional.batch_norm(x, None, None, weight, bias, True, residual=r, activation="relu")
    expected = F.relu(F.batch_norm(x, None, None, weight, bias, True) + r)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(z, leaves, grad_out) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
