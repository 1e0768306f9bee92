"""fastbn.convert fuses addition and activation where a module's forward has them, with results as without."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbn
from fastbn.ops.activations import ACTIVATIONS
from tests.transforms.fused import check, inputs, random_state, recorded_calls

X = inputs(4, 3, 5, 5)


class ConvNorm(nn.Module):
    """A convolution and a normalisation, nothing after them."""

    def __init__(self, channels=3, activation=None):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.Identity() if activation is None else activation

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    """torchvision's BasicBlock in small."""

    def __init__(self, downsample=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def downsample():
    return nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))


class Forward(nn.Module):
    """The children of `module_with`."""

    def __init__(self, **children):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        for name, child in children.items():
            setattr(self, name, child)


def module_with(forward, **children):
    """Return a module with that forward, two convolutions, two normalisations, and `children`."""
    return type("Module", (Forward,), {"forward": forward})(**children)


def tolerance(name):
    """Return the tolerance for an activation: torch's derivative of hardsigmoid has 1 / 6 in float32."""
    return {"rtol": 2**-23, "atol": 2**-23} if name == "hardsigmoid" else {}


MODULES = [
    (nn.ReLU(inplace=True), "relu"),
    (nn.ReLU6(), "relu6"),
    (nn.Hardtanh(0.0, 6.0), "relu6"),
    (nn.LeakyReLU(0.2, inplace=True), "leaky_relu"),
    (nn.ELU(0.7), "elu"),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.Hardswish(), "hardswish"),
    (nn.Hardsigmoid(), "hardsigmoid"),
    (nn.Mish(), "mish"),
    (nn.Softplus(), "softplus"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Tanh(), "tanh"),
]
NOT_FUSED = [
    nn.GELU("tanh"),
    nn.Hardtanh(),
    nn.Softplus(beta=2),
    nn.Softplus(threshold=10),
    nn.PReLU(),
    nn.CELU(),
    nn.Softmax(1),
    nn.LeakyReLU(-0.1),
]


@pytest.mark.parametrize("activation, name", MODULES, ids=lambda v: v if isinstance(v, str) else "")
def test_activation_modules(activation, name):
    check(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), activation), X, fused=[name], **tolerance(name))
    check(ConvNorm(activation=activation), X, fused=[name], **tolerance(name))


def test_every_activation_of_the_ops_has_a_module():
    assert {name for _, name in MODULES} == set(ACTIVATIONS) - {"none"}


@pytest.mark.parametrize("activation", NOT_FUSED, ids=str)
def test_activation_modules_that_no_op_has(activation):
    check(nn.Sequential(nn.BatchNorm2d(3), activation), X, fused=[""])
    check(ConvNorm(activation=activation), X, fused=[""])


FUNCTIONS = [
    (lambda self, x: F.relu(self.bn(x)), "relu"),
    (lambda self, x: F.relu(self.bn(x), inplace=True), "relu"),
    (lambda self, x: torch.relu(self.bn(x)), "relu"),
    (lambda self, x: torch.relu_(self.bn(x)), "relu"),
    (lambda self, x: self.bn(x).relu(), "relu"),
    (lambda self, x: self.bn(x).relu_(), "relu"),
    (lambda self, x: F.leaky_relu(self.bn(x), 0.3), "leaky_relu"),
    (lambda self, x: F.leaky_relu(self.bn(x), negative_slope=0.3, inplace=True), "leaky_relu"),
    (lambda self, x: F.relu6(self.bn(x)), "relu6"),
    (lambda self, x: F.elu(self.bn(x), 0.4), "elu"),
    (lambda self, x: F.silu(self.bn(x)), "silu"),
    (lambda self, x: F.gelu(self.bn(x)), "gelu"),
    (lambda self, x: F.gelu(self.bn(x), approximate="tanh"), ""),
    (lambda self, x: F.hardswish(self.bn(x)), "hardswish"),
    (lambda self, x: F.hardsigmoid(self.bn(x)), "hardsigmoid"),
    (lambda self, x: F.mish(self.bn(x)), "mish"),
    (lambda self, x: F.softplus(self.bn(x)), "softplus"),
    (lambda self, x: F.softplus(self.bn(x), beta=3), ""),
    (lambda self, x: torch.sigmoid(self.bn(x)), "sigmoid"),
    (lambda self, x: self.bn(x).sigmoid(), "sigmoid"),
    (lambda self, x: torch.tanh(self.bn(x)), "tanh"),
    (lambda self, x: self.bn(x).tanh(), "tanh"),
    (lambda self, x: torch.exp(self.bn(x)), ""),
]


@pytest.mark.parametrize("forward, name", FUNCTIONS, ids=[f"{i}-{name}" for i, (_, name) in enumerate(FUNCTIONS)])
def test_activation_functions(forward, name):
    check(module_with(forward), X, fused=[name], **tolerance(name))


ADDITIONS = [
    lambda self, x, r: self.bn(x) + r,
    lambda self, x, r: r + self.bn(x),
    lambda self, x, r: torch.add(self.bn(x), r),
    lambda self, x, r: torch.add(r, self.bn(x), alpha=1),
    lambda self, x, r: torch.add(self.bn(x), other=r),
    lambda self, x, r: self.bn(x).add(r),
    lambda self, x, r: r.add(self.bn(x)),
    lambda self, x, r: self.bn(x).add_(r),
]


def in_place(self, x, r):
    y = self.bn(x)
    y += r
    return y


@pytest.mark.parametrize("forward", [*ADDITIONS, in_place], ids=[*map(str, range(len(ADDITIONS))), "iadd"])
def test_additions(forward):
    check(module_with(forward), X, inputs(*X.shape, seed=1), fused=["add"])
    check(module_with(lambda self, x, r: forward(self, x, r).relu()), X, inputs(*X.shape, seed=1), fused=["add+relu"])


OTHER_ARITHMETIC = [
    lambda self, x, r: torch.add(self.bn(x), r, alpha=2),
    lambda self, x, r: self.bn(x).sub(r),
    lambda self, x, r: self.bn(x) - r,
    lambda self, x, r: self.bn(x) * r,
    lambda self, x, r: self.bn(x) + 1,
    lambda self, x, r: self.bn(x).add(2.5),
]


@pytest.mark.parametrize("forward", OTHER_ARITHMETIC, ids=map(str, range(len(OTHER_ARITHMETIC))))
def test_other_arithmetic_is_not_fused(forward):
    check(module_with(forward), X, inputs(*X.shape, seed=1), fused=[""])


def test_a_residual_block():
    check(Block(), X, fused=["relu", "add+relu"])


def test_a_downsampled_block_gives_the_addition_to_the_later_normalisation():
    check(Block(downsample()), X, fused=["relu", "", "add+relu"])


def test_a_downsampling_without_normalisation_is_computed_between():
    model = check(Block(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))), X, fused=["relu", "add+relu"])
    assert not isinstance(model.downsample, type(model))


def test_two_normalisations_are_added():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))

    check(module_with(forward), X, fused=["", "add+relu"])


def test_dropout_and_identity_between_are_passed_where_they_do_nothing():
    def forward(self, x):
        return self.act(self.drop(self.identity(self.bn(x))))

    children = {"identity": nn.Identity(), "drop": nn.Dropout(0.5), "act": nn.ReLU()}
    check(module_with(forward, **children), X, fused=["relu"], modes=[False])
    check(module_with(forward, **children), X, fused=[""], modes=[True])
    check(module_with(forward, **children | {"drop": nn.Dropout(0.0)}), X, fused=["relu"])
    sequence = [nn.BatchNorm2d(3), nn.Identity(), nn.Dropout2d(0.5), nn.SiLU()]
    check(nn.Sequential(*sequence), X, fused=["silu"], modes=[False])
    check(nn.Sequential(*sequence), X, fused=[""], modes=[True])


class Inverted(nn.Module):
    """torchvision's InvertedResidual in small: the addition is the parent's, the normalisation the child's."""

    def __init__(self, *children):
        super().__init__()
        self.conv, self.use_res_connect = nn.Sequential(*children), True

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def test_an_addition_is_passed_down_to_the_child_that_ends_in_a_normalisation():
    check(Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), X, fused=["add"])
    check(Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()), X, fused=["relu"])
    check(Inverted(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6()), nn.Sequential(ConvNorm())), X, fused=["relu6", "add"])


class HiddenStates(nn.Module):
    """transformers' ResNetBasicLayer in small."""

    def __init__(self, shortcut):
        super().__init__()
        self.shortcut, self.activation = shortcut, nn.ReLU()
        self.layer = nn.Sequential(ConvNorm(activation=nn.ReLU()), ConvNorm())

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


def test_addition_and_activation_are_passed_down_two_levels():
    check(HiddenStates(nn.Identity()), X, fused=["relu", "add+relu"])


def test_an_in_place_addition_onto_the_result_of_a_child():
    check(HiddenStates(downsample()), X, fused=["relu", "", "add+relu"])

    def share(model):
        model.layer[1].act = nn.Softshrink()

    check(HiddenStates(downsample()), X, fused=["relu", "", ""], change=share)


def test_a_container_stays_what_it_was():
    model = random_state(nn.Sequential(Block(), Block(downsample()), ConvNorm(activation=nn.ReLU())))
    names, text, state = [n for n, _ in model.named_modules()], repr(model), model.state_dict()
    children = list(model.modules())
    fastbn.convert(model)
    assert [n for n, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(model.modules(), children, strict=True))
    assert repr(model) == text and type(model[0]) is not Block and type(model[0]).__name__ == "Block"
    assert isinstance(model[0], Block) and isinstance(model, nn.Sequential)
    assert list(model.state_dict()) == list(state)
    assert type(model[0]).__module__ == Block.__module__ and type(model[0]).__qualname__ == Block.__qualname__


def test_blocks_of_a_kind_share_one_class_and_code():
    model = fastbn.convert(nn.Sequential(Block(), Block(), Block(downsample())))
    assert type(model[0]) is type(model[1]) is not type(model[2])
    assert type(model[0]).forward.__code__ is not type(model[2]).forward.__code__


def test_fuse_false_only_swaps_the_layers():
    model = fastbn.convert(Block(), fuse=False)
    assert type(model) is Block and type(model.bn1) is fastbn.BatchNorm2d


def test_modules_that_call_no_normalisation_keep_their_class():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU()), nn.Sequential(nn.BatchNorm2d(3), nn.Softmax(1)))
    fastbn.convert(model)
    assert [type(m) for m in (model, model[1], model[2])] == [nn.Sequential] * 3


def test_a_second_call_fuses_what_has_been_added():
    model = fastbn.convert(random_state(nn.Sequential(Block(), Block())))
    model[1] = random_state(Block())
    fastbn.convert(model)
    with recorded_calls() as calls:
        model(X)
    assert calls == ["relu", "add+relu"] * 2


def test_a_subclass_of_sequential_that_inherits_forward():
    class ConvNormActivation(nn.Sequential):
        pass

    class Reversed(nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    check(ConvNormActivation(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()), X, fused=["silu"])
    check(Reversed(nn.SiLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), X, fused=["silu"])


def test_a_sequential_may_be_sliced_extended_and_edited():
    model = fastbn.convert(
        random_state(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    )
    for edit, expected in [
        (lambda m: m[:2], [""]),
        (lambda m: m[1:], ["relu", ""]),
        (lambda m: m.append(nn.SiLU().double()), ["relu", "silu"]),
        (lambda m: m.insert(2, nn.Identity()), ["relu", "silu"]),
    ]:
        edited = edit(model)
        with recorded_calls() as calls:
            edited(X)
        assert calls == expected
    model[3] = nn.Softmax(1)
    with recorded_calls() as calls:
        model(X)
    assert calls == ["", "silu"]


@pytest.mark.parametrize("dim", [1, 3])
def test_other_dimensions(dim):
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dim](3)
    check(nn.Sequential(norm, nn.ReLU()), inputs(4, 3, *[2] * dim), fused=["relu"])


def test_frozen_layers_are_fused_too():
    model = fastbn.freeze(random_state(Block()))
    with recorded_calls() as calls:
        fastbn.convert(model).train()(X)
    assert calls == ["relu", "add+relu"]
