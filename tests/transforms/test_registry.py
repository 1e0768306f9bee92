"""fastbn.transforms.register tells convert of classes that are not torch.nn's; built-in entries fit their libraries."""

import copy
import importlib

import pytest
import torch
from torch import nn

import fastbn
from fastbn.nn import epilogue, torch_activations
from fastbn.transforms import register
from fastbn.transforms.fuse import layers, trace
from fastbn.transforms.registry import INPUT_TYPES
from tests.packages import needs
from tests.transforms.fused import assert_same, check, inputs, random_state, recorded_calls, step
from tests.transforms.test_fuse import module_with

X = inputs(4, 3, 5, 5)


@pytest.fixture(autouse=True)
def _registry_as_before():
    tables = [torch_activations.ACTIVATIONS, epilogue.IDENTITIES, layers.LAYERS, INPUT_TYPES]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Leaky(nn.Module):
    slope = 0.3

    def forward(self, x):
        return torch.where(x > 0, x, x * self.slope)


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x * (1 - self.rate) if self.training else x


class NormAct(nn.BatchNorm2d):
    """A normalisation with its activation, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


def arguments(module, input):
    return {
        "running_mean": module.running_mean,
        "running_var": module.running_var,
        "weight": module.weight,
        "bias": module.bias,
        "training": module.training,
        "momentum": module.momentum,
        "eps": module.eps,
        "num_batches_tracked": module.num_batches_tracked if module.training else None,
    }


def test_an_activation():
    check(nn.Sequential(nn.BatchNorm2d(3), Swish()), X, fused=[""])
    register(Swish, activation="silu")
    check(nn.Sequential(nn.BatchNorm2d(3), Swish()), X, fused=["silu"])
    register(f"{Leaky.__module__}.Leaky", activation=lambda module: ("leaky_relu", module.slope))
    check(module_with(lambda self, x: self.act(self.bn(x)), act=Leaky()), X, fused=["leaky_relu"])


def test_an_identity():
    register(DropPath, identity=lambda module: not module.training)
    model = nn.Sequential(nn.BatchNorm2d(3), DropPath(0.1), nn.ReLU())
    check(model, X, fused=["relu"], modes=[False])
    check(model, X, fused=[""], modes=[True])


def test_a_layer():
    register(NormAct, layer=arguments, steps=lambda module: (module.act,))
    model = check(nn.Sequential(nn.Conv2d(3, 3, 1), NormAct(3)), X, fused=["silu"])
    assert isinstance(model[1], NormAct) and fastbn.transforms.report(model).layers[0].outcome == "fused with silu"
    fastbn.revert(model)
    assert type(model[1]) is NormAct


def test_a_layer_that_is_followed_by_more():
    register(NormAct, layer=arguments, steps=lambda module: (module.act,))

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)

    check(module_with(forward, norm=NormAct(3)), X, fused=["silu"])
    without = NormAct(3)
    without.act = nn.Identity()
    check(module_with(forward, norm=without), X, fused=["add+relu"])
    hooked = NormAct(3)
    hooked.act.register_forward_hook(lambda module, args, output: output * 2)
    check(module_with(forward, norm=hooked), X, fused=[])


def test_a_layer_whose_own_forward_has_to_run():
    register(NormAct, layer=lambda module, input: None, steps=lambda module: (module.act,))
    check(nn.Sequential(NormAct(3)), X, fused=[])


class TakesList(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, features):
        if isinstance(features, torch.Tensor):
            features = [features]
        return torch.relu(self.bn(torch.cat(features, 1)))


def test_a_forward_that_takes_a_list():
    register(TakesList, inputs=list)
    model = random_state(TakesList())
    twin = copy.deepcopy(model)
    fastbn.convert(model)
    with recorded_calls() as calls:
        torch.testing.assert_close(model([X, X]), twin([X, X]))
        torch.testing.assert_close(model(torch.cat([X, X], 1)), twin(torch.cat([X, X], 1)))
    assert calls == ["relu", ""]


def pad_if_odd(x, module):
    return torch.nn.functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x


def test_a_function_that_decides_by_the_shape(monkeypatch):
    monkeypatch.setattr(trace, "LEAF_FUNCTIONS", set())
    monkeypatch.setattr(fastbn.transforms.registry, "LEAF_FUNCTIONS", trace.LEAF_FUNCTIONS)

    def forward(self, x):
        return torch.relu(self.bn(pad_if_odd(x, self.conv)))

    check(module_with(forward), X, fused=[""])
    register(f"{__name__}.pad_if_odd", leaf=True)
    model = check(module_with(forward), X, fused=["relu"])
    assert model(X).shape[-1] == 6 and model(X[..., :4]).shape[-1] == 4


def test_misuse():
    with pytest.raises(TypeError, match="register: expected a class or its name, got int"):
        register(3, activation="relu")
    with pytest.raises(ValueError, match="register: expected activation, identity, layer or inputs"):
        register(Swish)


@needs("torchvision")
def test_frozen_layers_of_torchvision():
    from torchvision.ops import misc

    def build():
        return nn.Sequential(nn.Conv2d(3, 3, 1), misc.FrozenBatchNorm2d(3), nn.ReLU())

    model = check(build(), X, fused=["relu"])
    assert isinstance(model[1], misc.FrozenBatchNorm2d)
    half = fastbn.convert(random_state(build()))
    half[1].float()
    with recorded_calls() as calls:
        half(X)
    assert calls == []  # torchvision's promotes to the buffers' dtype


@needs("timm")
def test_layers_of_timm():
    from timm.layers import norm_act

    for cls in (norm_act.BatchNormAct2d, norm_act.FrozenBatchNormAct2d):
        check(nn.Sequential(nn.Conv2d(3, 3, 1), cls(3, act_layer=nn.SiLU, inplace=False)), X, fused=["silu"])
        check(nn.Sequential(nn.Conv2d(3, 3, 1), cls(3, apply_act=False), nn.ReLU()), X, fused=["relu"])
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        if options == {"momentum": None}:
            options["momentum"] = 0.3
        check(nn.Sequential(norm_act.BatchNormAct2d(3, **options)), X, fused=["relu"])


ACTIVATIONS = [name for name, facts in fastbn.transforms.registry._named.items() if facts["activation"]]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name.split(".")[0])) for name in ACTIVATIONS])
def test_activations_of_other_libraries(name):
    module, _, cls = name.rpartition(".")
    activation = getattr(importlib.import_module(module), cls)()
    fused = fastbn.transforms.registry._named[name]["activation"]
    model = nn.Sequential(nn.BatchNorm2d(3), activation)
    check(model, X, fused=[fused], rtol=1e-6, atol=1e-6)


def test_step_and_comparison_find_a_difference():
    model = random_state(nn.Sequential(nn.BatchNorm2d(3)))
    results = step(model, X)
    with pytest.raises(AssertionError, match="grad of 0.weight"):
        assert_same(results | {"grad of 0.weight": results["grad of 0.weight"] + 1}, results)
