"""The pass of torch.compile: what it replaces, what it leaves, and that the compiled model computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastbn
from fastbn.transforms.compile_pass import fuse_graph


class Model(nn.Module):
    """conv, BatchNorm, and what `rest(y, x)` makes of it, where x is the input."""

    def __init__(self, rest, **options):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, **options)
        self.rest = rest

    def forward(self, x):
        return self.rest(self.bn(self.conv(x)), x)


def calls_of(model, x, device_types=("cpu",)):
    """Compile with the pass, compare with eager after two steps, and return the kwargs of the calls it put in."""
    calls = []

    def backend(graph_module, inputs):
        fuse_graph(graph_module.graph, device_types)
        for node in graph_module.graph.nodes:
            if node.target is fastbn.functional.batch_norm:
                names = ("residual", "activation", "activation_param", "backend")
                calls.append({name: node.kwargs.get(name) for name in names})
        graph_module.recompile()
        return aot_eager(graph_module, inputs)

    model = model.double()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    x, x_of_twin = x.double().requires_grad_(), x.double().requires_grad_()
    for _ in range(2):
        outputs = compiled(x), twin(x_of_twin)
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(x.grad, x_of_twin.grad)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    return calls


@torch.library.custom_op("fastbn_tests::exponential", mutates_args=("x",))
def exponential(x: torch.Tensor) -> None:
    x.exp_()


@pytest.fixture
def x():
    return torch.randn(3, 4, 6, 6)


def options_of(call):
    return {name: value for name, value in call.items() if value is not None and name != "backend"}


@pytest.mark.parametrize(
    "rest, expected",
    [
        (lambda y, x: y, {}),
        (lambda y, x: F.relu(y), {"activation": "relu"}),
        (lambda y, x: F.relu(y, inplace=True), {"activation": "relu"}),
        (lambda y, x: y.relu_(), {"activation": "relu"}),
        (lambda y, x: torch.sigmoid(y), {"activation": "sigmoid"}),
        (lambda y, x: F.leaky_relu(y, 0.2), {"activation": "leaky_relu", "activation_param": 0.2}),
        (lambda y, x: F.elu(y, alpha=2.0), {"activation": "elu", "activation_param": 2.0}),
        (lambda y, x: F.gelu(y), {"activation": "gelu"}),
        (lambda y, x: F.gelu(y, approximate="tanh"), {}),
        (lambda y, x: F.relu(y + x), {"residual": True, "activation": "relu"}),
        (lambda y, x: F.silu(x + y), {"residual": True, "activation": "silu"}),
        (lambda y, x: y.add_(x).relu(), {"residual": True, "activation": "relu"}),
        (lambda y, x: torch.add(y, x), {"residual": True}),
        (lambda y, x: torch.add(y, x, alpha=2), {}),
        (lambda y, x: y + y, {}),
        (lambda y, x: y + 1, {}),
        (lambda y, x: F.relu(y + x.mean(0, keepdim=True)), {}),  # broadcasts
        (lambda y, x: F.relu(y) + y, {}),  # someone else reads y
        (lambda y, x: (x.transpose(2, 3) + y).transpose(2, 3).view(3, -1), {}),  # has the strides of its first operand
        (lambda y, x: (y + x).relu() * (y + x).detach(), {}),
        (lambda y, x: F.relu(F.relu(y) + x), {"activation": "relu"}),
    ],
)
def test_what_follows_is_fused_where_one_op_can_do_it(x, rest, expected):
    (call,) = calls_of(Model(rest), x)
    assert {name: True if name == "residual" else value for name, value in options_of(call).items()} == expected


def test_what_the_op_reads_must_not_change_before_the_end_of_its_chain(x):
    class Changes(Model):
        def forward(self, x):
            residual = x * 2
            y = self.bn(self.conv(x)) + residual
            residual.mul_(3)
            return F.relu(y) + residual

    (call,) = calls_of(Changes(None), x)
    assert options_of(call) == {}

    class ChangesByAnOperator(Model):
        def forward(self, x):
            residual = x.detach() * 2
            y = self.bn(self.conv(x)) + residual
            exponential(residual)
            return F.relu(y) + residual

    (call,) = calls_of(ChangesByAnOperator(None), x)
    assert options_of(call) == {}


def test_running_statistics_are_read_in_the_order_of_the_model(x):
    class Reads(Model):
        def forward(self, x):
            y = self.bn(self.conv(x))
            mean = self.bn.running_mean.view(-1, 1, 1) * 2
            return F.relu(y) + mean

    (call,) = calls_of(Reads(None), x)
    assert options_of(call) == {}


def test_other_normalisations_and_counters_in_between_do_not_hinder(x):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn, self.bn_of_shortcut = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            y += self.bn_of_shortcut(self.shortcut(x))
            return F.relu(y, inplace=True)

    shortcut, fused = calls_of(Block(), x)  # the latter where its chain ends
    assert options_of(shortcut) == {}
    assert list(options_of(fused)) == ["residual", "activation"]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 1e-3}])
def test_options_of_the_layer(x, options):
    assert len(calls_of(Model(lambda y, x: F.relu(y), **options), x)) == 1


def test_evaluation_and_other_devices_stay_torchs(x):
    assert calls_of(Model(lambda y, x: F.relu(y)), x, device_types=("cuda",)) == []
    assert calls_of(Model(lambda y, x: F.relu(y)).eval(), x) == []


def test_the_decider_is_asked(x, monkeypatch):
    from fastbn.backends import aten, registry

    monkeypatch.setattr(registry, "choose", lambda call, name=None, **_: (aten.TORCH, "asked"))
    assert calls_of(Model(lambda y, x: F.relu(y)), x) == []


@pytest.mark.slow
def test_inductor_runs_the_pass(x):
    from torch._inductor.utils import run_and_get_code

    model = Model(lambda y, x: F.relu(y + x))
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, options={"pre_grad_custom_pass": fastbn.compile_pass(["cpu"])})
    output, sources = run_and_get_code(compiled, x)
    torch.testing.assert_close(output, twin(x))
    assert any("fastbn.batch_norm_train" in source for source in sources)
    torch.testing.assert_close(model.bn.running_var, twin.bn.running_var)


def test_the_pass_has_a_key_for_caches():
    default, other = fastbn.compile_pass(), fastbn.compile_pass(["cpu"])
    assert default.uuid() == fastbn.compile_pass(["cuda"]).uuid() != other.uuid()
