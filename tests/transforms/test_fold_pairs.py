"""Which pairs fastbn.fold folds: never one whose first layer something else may read, call or share."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbn
from fastbn.transforms.fold import examine
from tests.packages import needs
from tests.transforms.test_fold import filled, images


class Block(nn.Module):
    """conv and norm, whose forward each subclass gives another form."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x))) + x


class Untraceable(Block):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


class ByKeyword(Block):
    def forward(self, x):
        return self.norm(input=self.conv(x))


class Optional(Block):
    """Traced for a mask and without one."""

    def forward(self, x, mask=None):
        y = self.norm(self.conv(x))
        return y if mask is None else y * mask


class Flag(Block):
    """Traced for both values of the flag."""

    def forward(self, x, negative=False):
        y = self.norm(self.conv(x))
        return -y if negative else y


class AssignsAttributes(Block):
    def forward(self, x):
        self.last = self.conv(x)
        return self.norm(self.last)


class TwoReaders(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class IsReturned(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


class CalledTwice(Block):
    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class NormTwice(Block):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class ReluBetween(Block):
    def forward(self, x):
        return self.norm(self.relu(self.conv(x)))


class PreActivation(Block):
    def forward(self, x):
        return self.conv(self.norm(x))


class FunctionalConv(Block):
    def forward(self, x):
        return self.norm(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1))


class ReadsWeight(Block):
    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class ReadsStatistics(Block):
    def forward(self, x):
        return self.norm(self.conv(x)) - self.norm.running_mean.sum()


class DependsOnArguments(Block):
    def forward(self, x, raw=None):
        y = self.conv(x)
        return self.norm(y) if raw is None else self.norm(self.relu(y))


class FlagSkips(Block):
    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.norm(y)


class NameSkips(Block):
    def forward(self, x, mode="full"):
        y = self.conv(x)
        return y if mode in ("raw", "rough") else self.norm(y)


class LevelSkips(Block):
    def forward(self, x, *, level=2):
        y = self.conv(x)
        if level == 1:
            return y
        return self.norm(y)


class FlagsSkip(Block):
    def forward(self, x, raw=False, level=0.5):
        y = self.conv(x)
        return y if raw and level > 1 else self.norm(y)


class TruthSkips(Block):
    def forward(self, x, raw=None):
        y = self.conv(x)
        return y if raw else self.norm(y)


class ChoosesConvolution(Block):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, x, other=None):
        return self.norm(self.conv(x) if other is None else self.other(x))


class MayBeSkipped(Block):
    def forward(self, x, norm=None):
        y = self.conv(x)
        return self.norm(y) if norm is None else norm * y


def sequence(*layers):
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *layers)


class Parent(nn.Module):
    """A module around a block or a sequence of the names `child` and `children_`."""

    def __init__(self, child=None, elements=None):
        super().__init__()
        self.child = sequence(nn.ReLU()) if child is None else child
        self.elements = nn.ModuleList([sequence(), sequence()] if elements is None else elements)

    def forward(self, x):
        y = self.child(x)
        for element in self.elements:
            y = element(y)
        return y


class UntraceableParent(Parent):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Features(Parent):
    """Collects what layers of a sequence give, as feature extractors do."""

    def forward(self, x):
        found = []
        for layer in self.child:
            x = layer(x)
            found.append(x)
        return found


class LastFeature(Parent):
    """Walks over a sequence, but collects what no pair hides."""

    def forward(self, x):
        found = []
        for i, layer in enumerate(self.child):
            x = layer(x)
            if i > 0:
                found.append(x)
        return found


class UntraceableFeatures(Features):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else []


class UntraceableIndex(Parent):
    def forward(self, x):
        return self.child[0](x) if x.sum() > 0 else self.child(x)


class UntraceableMethod(Parent):
    def forward(self, x):
        return self._raw(x) if x.sum() > 0 else self.child(x)

    def _raw(self, x):
        return self.child[0](x)


class UntraceableNested(Parent):
    def forward(self, x):
        for element in self.elements:
            for layer in element:
                x = layer(x)
        return self.child(x) if x.sum() > 0 else x


class UntraceableAttribute(Parent):
    def forward(self, x):
        for element in self.elements:
            x = element.conv(x) if x.sum() > 0 else element(x)
        return x


class UntraceableSelf(Parent):
    def forward(self, x):
        return getattr(self, "child")(x) if x.sum() > 0 else x


class UntraceableWalk(Parent):
    def forward(self, x):
        for layer in self.children():
            x = layer(x) if x.sum() > 0 else x
        return x


class TracedIntoChild(Parent):
    def forward(self, x):
        return self.child(x) + self.child.conv(x)


FOLDED = {
    "a sequence": (sequence, 1),
    "a forward": (Block, 1),
    "by keyword": (ByKeyword, 1),
    "an optional argument": (Optional, 1),
    "a flag": (Flag, 1),
    "an attribute is assigned": (AssignsAttributes, 1),
    "parents": (Parent, 3),
    "an untraceable parent": (UntraceableParent, 3),
    "a parent that calls a method of its list": (lambda: UntraceableParent(Block(), [Block(), Flag()]), 3),
    "a wrapper of torch": (lambda: nn.DataParallel(sequence()), 1),
    "the last features": (lambda: LastFeature(elements=[]), 1),
    "a nested sequence": (lambda: nn.Sequential(sequence(), sequence(sequence())), 3),
    "a sequence under two names": (lambda: (lambda s: nn.Sequential(s, s))(sequence()), 1),
    "a subclass without a forward": (lambda: nn.Sequential(type("C", (nn.Conv2d,), {})(3, 3, 1), nn.BatchNorm2d(3)), 1),
    "a norm that shares its weight": (lambda: share_norms(), 2),
}


def share_norms():
    model = sequence(*sequence())
    model[3].weight = model[1].weight
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    make, count = FOLDED[name]
    model = filled(make())
    report = examine(model)
    assert (len(report.folded), len(report.left)) == (count, 0), str(report)
    folded = fastbn.fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images()), model(images()))


def hooked(which, register):
    def make():
        model = sequence()
        getattr(model[which], register)(lambda *_: None)
        return model

    return make


def tied(share):
    def make():
        model = sequence(*sequence())
        share(model)
        return model

    return make


def share_weight(model):
    model[2].weight = model[0].weight


def share_bias(model):
    model[2].bias = model[0].bias


def parametrised():
    model = sequence()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def spectral():
    model = sequence()
    nn.utils.spectral_norm(model[0])
    return model


def patched():
    model = sequence()
    model[0].forward = lambda x: F.conv2d(x, model[0].weight)
    return model


def patched_parent():
    model = Parent()
    model.forward = lambda x: model.child[0](x)
    return model


def of_no_source():
    namespace = {"Parent": Parent}
    exec(
        "class Generated(Parent):\n    def forward(self, x):\n        return self.child(x) if x.sum() > 0 else x",
        namespace,
    )
    return namespace["Generated"](elements=[])


def twice(a, b):
    return lambda: (lambda m: nn.Sequential(m[0], m[1], m[a], m[b]))([*sequence(), *sequence()])


def overflowing():
    model = sequence().half()
    model[0].weight.data.fill_(1000)
    model[1].running_var.fill_(0)
    return model


class OtherNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class OtherConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


LEFT = {
    "two readers": (TwoReaders, "something else reads the output of conv"),
    "is returned": (IsReturned, "something else reads the output of conv"),
    "the convolution twice": (CalledTwice, "conv is called more than once"),
    "the norm twice": (NormTwice, "it is called more than once"),
    "an operation between": (ReluBetween, r"its input is from relu \(ReLU\)"),
    "before a convolution": (PreActivation, "before a convolution cannot be folded, since padding comes after it"),
    "a functional convolution": (FunctionalConv, "its input is from an operation"),
    "a forward reads the weight": (ReadsWeight, "a forward uses conv without calling it"),
    "a forward reads the statistics": (ReadsStatistics, "a forward uses norm without calling it"),
    "arguments decide": (DependsOnArguments, r"its input is from relu"),
    "arguments choose a convolution": (ChoosesConvolution, "what comes before it depends on arguments"),
    "an argument skips it": (MayBeSkipped, "whether it is called depends on arguments"),
    "a flag skips it": (FlagSkips, "whether it is called depends on arguments"),
    "a name skips it": (NameSkips, "whether it is called depends on arguments"),
    "a level skips it": (LevelSkips, "whether it is called depends on arguments"),
    "flags skip it": (FlagsSkip, "whether it is called depends on arguments"),
    "the truth of an argument skips it": (TruthSkips, "whether it is called depends on arguments"),
    "an untraceable forward": (Untraceable, "no forward that torch.fx can trace calls it"),
    "a shared convolution": (twice(0, 3), "0 is called more than once"),
    "a shared norm": (twice(2, 1), "it is called more than once"),
    "shared by two sequences": (
        lambda: (lambda s: nn.Sequential(s, nn.Sequential(s[0], s[1])))(sequence()),
        "called in more than one place",
    ),
    "a norm shared by two sequences": (
        lambda: (lambda s: nn.Sequential(s, nn.Sequential(nn.Conv2d(3, 3, 1), s[1])))(sequence()),
        "it is called in more than one place",
    ),
    "a tied weight": (tied(share_weight), "0 shares a parameter with 2|2 shares a parameter with 0"),
    "a tied bias": (tied(share_bias), "0 shares a parameter with 2|2 shares a parameter with 0"),
    "a parametrised weight": (parametrised, "the weight of 0 is no plain parameter"),
    "spectral norm": (spectral, "0 has hooks"),
    "a forward hook": (hooked(0, "register_forward_hook"), "0 has hooks"),
    "a pre-hook": (hooked(1, "register_forward_pre_hook"), "1 has hooks"),
    "a backward hook": (hooked(1, "register_full_backward_hook"), "1 has hooks"),
    "a patched forward": (patched, "0 has a forward of its own"),
    "no running statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        "it has no running statistics",
    ),
    "a norm with a forward": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), OtherNorm(3)), "what OtherNorm computes"),
    "a convolution with a forward": (lambda: nn.Sequential(OtherConv(3, 3, 1), nn.BatchNorm2d(3)), r"\(OtherConv\)"),
    "a norm of another dimension": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)),
        "3 channels, but 0 has 4",
    ),
    "a range that ends": (overflowing, "leave the range of its dtype"),
    "alone": (lambda: nn.BatchNorm2d(3), "no forward that torch.fx can trace calls it"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    make, reason = LEFT[name]
    model = filled(make()) if name != "a range that ends" else make().eval()
    report = examine(model)
    assert not report.folded and report.left, str(report)
    for left in report.left:
        assert re.search(reason, left.reason), left.reason
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert all(torch.equal(t, before[key]) for key, t in fastbn.fold(model).state_dict().items())


# What a parent reaches into, and what of it may still be folded.
REACHED = {
    "a walk over a sequence": (Features, [], "something else reads the output of child.0"),
    "an untraceable walk": (UntraceableFeatures, ["elements.0.1", "elements.1.1"], "may call child.0 by itself"),
    "an untraceable index": (UntraceableIndex, ["elements.0.1", "elements.1.1"], "may call child.0 by itself"),
    "a method": (UntraceableMethod, ["elements.0.1", "elements.1.1"], "may call child.0 by itself"),
    "a loop in a loop": (UntraceableNested, ["child.1"], "may call elements.[01].0 by itself"),
    "an attribute of others": (lambda: UntraceableAttribute(elements=[Block()]), ["child.1"], "uses an attribute conv"),
    "an attribute by its name": (UntraceableSelf, [], "may call .* by itself"),
    "all children": (UntraceableWalk, [], "may call .* by itself"),
    "a patched forward": (patched_parent, [], "may call .* by itself"),
    "no source": (of_no_source, [], "may call .* by itself"),
    "a traced call of a child's child": (lambda: TracedIntoChild(Block(), []), [], "called in more than one place"),
}


@pytest.mark.parametrize("name", REACHED)
def test_a_parent_reaches_into_a_child(name):
    make, still, reason = REACHED[name]
    report = examine(filled(make()))
    assert [entry.norm for entry in report.folded] == still, str(report)
    reasons = [left.reason for left in report.left if "no forward" not in left.reason]
    assert reasons and all(re.search(reason, text) for text in reasons), str(report)


def test_the_report_is_printed(capsys):
    model = filled(nn.Sequential(*sequence(nn.ReLU(), nn.BatchNorm2d(3))))
    fastbn.fold(model)
    assert capsys.readouterr().out == ""
    fastbn.fold(model, verbose=True)
    assert capsys.readouterr().out == (
        "fold: 1 of 2 BatchNorm layers folded\n  left 3: its input is from 2 (ReLU), not from a convolution or Linear\n"
    )


def test_examining_changes_nothing():
    """A forward that assigns attributes, changes a buffer or draws numbers is traced without any effect."""

    class Stateful(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls.add_(1)
            self.last = self.norm(self.conv(x))
            return self.last + torch.rand(())

    model = filled(Stateful())
    state = torch.get_rng_state()
    report = examine(model)
    assert [entry.norm for entry in report.folded] == ["norm"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.last is None and torch.equal(model.calls, filled(Stateful()).calls)


def test_a_meta_model_is_folded():
    model = sequence().to("meta").eval()
    assert fastbn.fold(model)(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)


@needs("torchvision")
@pytest.mark.parametrize(
    "name, count",
    [("resnet18", 20), ("mobilenet_v3_small", 34), ("googlenet", 57), ("densenet121", 59)],
)
def test_networks_of_torchvision(name, count):
    from torchvision import models

    options = {"init_weights": False} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, **options).eval()
    folded = fastbn.fold(model)
    assert len(examine(model).folded) == count
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))
