"""fastbn.transforms.report tells of each layer what is fused, and why not more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbn
from fastbn.transforms import report
from tests.transforms.test_fuse import Block, ConvNorm, HiddenStates, Inverted, downsample, module_with


class Mine(nn.BatchNorm2d):
    pass


class Direct(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


def net():
    return nn.Sequential(
        Block(downsample()),
        ConvNorm(),
        Mine(3),
        nn.SyncBatchNorm(3),
        Direct(),
        HiddenStates(nn.Identity()),
        Inverted(nn.Conv2d(3, 3, 1), fastbn.BatchNorm2d(3, activation="silu")),
    )


def outcomes(model):
    return {layer.path: layer.outcome for layer in report(model).layers}


def test_of_each_layer():
    model = fastbn.convert(net())
    assert outcomes(model) == {
        "0.bn1": "fused with relu",
        "0.bn2": "converted",
        "0.downsample.1": "fused with addition and relu",
        "1.bn": "converted",
        "2": "left",
        "3": "converted",
        "5.layer.0.bn": "fused with relu",
        "5.layer.1.bn": "fused with addition and relu",
        "6.conv.1": "fused with silu",
    }
    found = report(model)
    assert found.calls == (("4", "Direct"),)
    assert (found.count("fused"), found.count("converted"), found.count("left")) == (5, 3, 1)
    by_path = {layer.path: layer for layer in found.layers}
    assert by_path["5.layer.1.bn"].container == "5" and by_path["0.downsample.1"].container == "0"
    assert by_path["2"].reason == "Mine is not known: fastbn.transforms.register"


def test_of_a_model_that_is_not_converted_or_not_fused():
    assert set(outcomes(Block())) == {"bn1", "bn2"} and set(outcomes(Block()).values()) == {"left"}
    assert {layer.reason for layer in report(Block()).layers} == {"not converted"}
    assert set(outcomes(fastbn.convert(Block(), fuse=False)).values()) == {"converted"}


def test_follows_what_the_modules_are_now():
    model = fastbn.convert(Block())
    model.relu = nn.SiLU()
    assert outcomes(model) == {"bn1": "fused with silu", "bn2": "fused with addition and silu"}
    model.relu = nn.Softmax(1)
    assert outcomes(model) == {"bn1": "converted", "bn2": "fused with addition"}


class Drops(nn.Module):
    """Dropout between a BatchNorm and what follows it: in the forward with `way`, or in a child."""

    def __init__(self, way):
        super().__init__()
        self.way, self.bn, self.drop, self.relu = way, nn.BatchNorm2d(3), nn.Dropout2d(0.5), nn.ReLU()

    def forward(self, x):
        if self.way == "before the addition":
            return self.relu(self.drop(self.bn(x)) + x)
        if self.way == "before the activation":
            return self.relu(self.drop(self.bn(x)))
        return self.relu(self.drop(self.bn(x) + x))


class DropsAtItsEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout2d(0.5)

    def forward(self, x):
        return self.drop(self.bn(x))


class AddsToAChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = DropsAtItsEnd()

    def forward(self, x):
        return F.relu(self.child(x) + x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make, active, idle",
    [
        (lambda: Drops("before the addition"), "converted", "fused with addition and relu"),
        (lambda: Drops("before the activation"), "converted", "fused with relu"),
        (lambda: Drops("after the addition"), "fused with addition", "fused with addition and relu"),
        (AddsToAChild, "converted", "fused with addition and relu"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Dropout2d(0.5), nn.ReLU()), "converted", "fused with relu"),
    ],
)
def test_tells_what_explain_tells_of_a_step_that_does_nothing_in_evaluation(make, active, idle, training):
    model = fastbn.convert(make()).train(training)
    (layer,) = report(model).layers
    assert layer.outcome == (active if training else idle)
    (plan,) = fastbn.explain(model, (2, 3, 4, 4)).values()
    assert ("relu" in plan.fused, "add" in plan.fused) == ("relu" in layer.outcome, "add" in layer.outcome)


def test_of_a_step_that_is_active_and_of_one_that_has_been_removed():
    model = fastbn.convert(Drops("before the addition"))
    assert report(model).layers[0].reason == "Dropout2d (drop) follows, and is active now"
    del model.drop, model.relu
    (layer,) = report(model.eval()).layers
    assert (layer.outcome, layer.reason) == ("converted", "drop follows in forward, and was removed")


def test_changes_nothing():
    model = net()
    types = [type(m) for m in model.modules()]
    report(model)
    assert [type(m) for m in model.modules()] == types


def test_the_reason_of_a_container_that_cannot_be_traced():
    def forward(self, x):
        return torch.relu(self.bn(x)) if x.sum() > 0 else x

    (first, _) = report(fastbn.convert(module_with(forward))).layers
    assert first.status == "converted" and first.reason.startswith("Module: ")


def test_as_text():
    text = str(report(fastbn.convert(net())))
    first, *others = text.splitlines()
    assert first == "9 layers: 5 fused, 3 converted, 1 left"
    assert "    2 fused with addition and relu (0.downsample.1, 5.layer.1.bn)" in others
    assert others[-1] == "      Direct (4) calls batch_norm itself, which stays"
    assert "(the model itself)" in str(report(nn.BatchNorm2d(3)))


def test_only_modules():
    with pytest.raises(TypeError, match="report: expected a torch.nn.Module, got list"):
        report([])
