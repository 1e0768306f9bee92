"""torch.jit.script compiles the layers by torch's own operations, and what it saves needs no fastbn."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fastbn
from fastbn.ops.activations import ACTIVATIONS
from tests.stock import CHANNELS, FAST, SHAPES, STOCK, assert_same, normal, pair

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*:Warning")


class Block(nn.Module):
    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x, residual):
        return self.bn(x, residual) + self.bn(x)


def _steps(module, *inputs):
    """Return what two steps in training and one in evaluation give, with gradients, and the state after them."""
    found = {}
    for number, training in enumerate((True, True, False)):
        module.train(training)
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = module(*leaves)
        trained = {f"input{i}": leaf for i, leaf in enumerate(leaves)} | dict(module.named_parameters())
        grads = torch.autograd.grad(output.square().sum(), list(trained.values()))
        found |= {f"{number} {name}": grad for name, grad in zip(trained, grads, strict=True)}
        found[f"{number} output"] = output.detach()
    return found | module.state_dict()


OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dim", SHAPES)
def test_a_layer(dim, options):
    _, fast = pair(dim, **options)
    scripted = torch.jit.script(copy.deepcopy(fast))
    x = normal(*SHAPES[dim])
    assert_same(_steps(scripted, x), _steps(fast, x))
    assert "fastbn::" not in str(scripted.inlined_graph)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residuals_and_activations(activation):
    _, fast = pair()
    fast.activation = activation
    # TorchScript's own fuser rounds a slope to float32, torch's layers' too.
    fast.activation_param = {"leaky_relu": 0.25, "elu": 0.75}.get(activation)
    block = Block(fast)
    scripted = torch.jit.script(copy.deepcopy(block))
    tensors = [normal(*SHAPES[2], seed=seed) for seed in range(2)]
    assert_same(_steps(scripted, *tensors), _steps(block, *tensors))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_layers(activation):
    frozen = fastbn.FrozenBatchNorm2d(CHANNELS, activation=activation, dtype=torch.float64)
    frozen.load_state_dict(pair()[1].state_dict())
    block = Block(frozen)
    scripted = torch.jit.script(copy.deepcopy(block))
    tensors = [normal(*SHAPES[2], seed=seed) for seed in range(2)]
    assert_same(_steps(scripted, *tensors), _steps(block, *tensors))


def test_the_model_stays_what_it_was():
    model = fastbn.convert(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    layer = model[0]
    scripted = torch.jit.script(model)
    assert model[0] is layer and type(layer) is fastbn.BatchNorm2d
    assert scripted[0].weight.data_ptr() == layer.weight.data_ptr()
    assert list(scripted.state_dict()) == list(model.state_dict())


def test_errors_are_torchs():
    x = torch.zeros(2, 3)
    messages = []
    for kinds in (STOCK, FAST):
        with pytest.raises(torch.jit.Error, match="expected 4D input") as caught:
            torch.jit.script(kinds[2](3))(x)
        messages.append(str(caught.value).splitlines()[-1])
    assert messages[0] == messages[1]


def test_renormalisation_is_refused():
    with pytest.raises(
        TypeError, match="torch.jit.script: expected layers with a form in TorchScript, got BatchRenorm2d"
    ):
        torch.jit.script(nn.Sequential(fastbn.BatchRenorm2d(3)))


def test_what_is_saved_loads_without_fastbn(tmp_path):
    _, fast = pair(dtype=torch.float32)
    fast.activation = "silu"
    block = Block(fast).eval()
    x = normal(*SHAPES[2], dtype=torch.float32)
    torch.jit.script(block).save(str(tmp_path / "block.pt"))
    torch.save((x, block(x, x).detach()), tmp_path / "tensors.pt")
    program = """
        import sys, torch
        x, expected = torch.load("tensors.pt")
        torch.testing.assert_close(torch.jit.load("block.pt")(x, x), expected)
        assert not any(name.startswith("fastbn") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True, timeout=120)
