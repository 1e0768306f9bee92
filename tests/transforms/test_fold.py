"""fastbn.fold: the numbers of a folded model, and what its shape and interface keep.

test_fold_pairs.py has the pairs that are folded and those that are not.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import fastbn
from fastbn.nn.folded import MODULES, FoldedBatchNorm
from fastbn.ops.activations import ACTIVATIONS, PIECEWISE_LINEAR, ROWS
from fastbn.testing.tolerance import ulp
from fastbn.transforms.fold import examine
from tests.packages import needs
from tests.stock import normal

# A layer without its dtype and bias, and the shape of its input.
LAYERS = {
    "Linear": (lambda **o: nn.Linear(6, 4, **o), (300, 6)),
    "Conv1d": (lambda **o: nn.Conv1d(6, 4, 3, **o), (3, 6, 11)),
    "Conv2d": (lambda **o: nn.Conv2d(6, 4, 3, padding=1, **o), (3, 6, 7, 5)),
    "Conv2d, groups": (lambda **o: nn.Conv2d(6, 4, 3, groups=2, stride=2, **o), (3, 6, 7, 5)),
    "Conv2d, depthwise": (lambda **o: nn.Conv2d(6, 6, (3, 1), groups=6, **o), (3, 6, 7, 5)),
    "Conv2d, dilation": (lambda **o: nn.Conv2d(6, 4, 3, dilation=2, padding=2, **o), (3, 6, 7, 5)),
    "Conv2d, reflect": (lambda **o: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", **o), (3, 6, 7, 5)),
    "Conv3d": (lambda **o: nn.Conv3d(6, 4, 3, padding="same", **o), (2, 6, 5, 3, 4)),
    "ConvTranspose1d": (lambda **o: nn.ConvTranspose1d(6, 4, 3, **o), (3, 6, 11)),
    "ConvTranspose2d": (lambda **o: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, **o), (3, 6, 7, 5)),
    "ConvTranspose2d, groups": (lambda **o: nn.ConvTranspose2d(6, 4, 3, groups=2, dilation=2, **o), (3, 6, 7, 5)),
    "ConvTranspose3d": (lambda **o: nn.ConvTranspose3d(6, 9, 2, groups=3, **o), (2, 6, 5, 3, 4)),
}
STOCK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filled(module: nn.Module) -> nn.Module:
    """Return a module in evaluation, no tensor of which has its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(value.abs() + 0.2 if name.endswith("var") else value)
    return module.eval()


def conv_bn(*rest: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return filled(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5) if norm is None else norm, *rest))


def images() -> torch.Tensor:
    return normal(2, 3, 6, 6, dtype=torch.float32)


def fuse_as_torch(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return what torch's function makes of a pair; of transposed convolutions it knows one group at a time."""
    fused, groups = copy.deepcopy(layer), layer.groups if isinstance(layer, TRANSPOSED) else 1
    split = [
        t.chunk(groups) if isinstance(t, torch.Tensor) else [t] * groups
        for t in (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    ]
    parts = [fuse_conv_bn_weights(*part, isinstance(layer, TRANSPOSED)) for part in zip(*split, strict=True)]
    fused.weight, fused.bias = (nn.Parameter(torch.cat(tensors)) for tensors in zip(*parts, strict=True))
    return fused.to(layer.weight.dtype)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_error_is_at_most_that_of_torch(name, dtype, bias, affine):
    """Its root mean square is at most the larger of that of torch's folding and that of the model before, plus 5 %
    that some hundred elements need: which way single weights are rounded is chance. So is the largest error, to an ulp.
    """
    make, shape = LAYERS[name]
    layer = make(bias=bias, dtype=dtype)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # float32 parameters go with a half type too.
    norm = STOCK[len(shape)](channels, affine=affine, eps=1e-3, dtype=torch.promote_types(dtype, torch.float32))
    model = filled(nn.Sequential(layer, norm))
    x = normal(*shape, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        folded = fastbn.fold(model)
        output, *others = folded(x), model(x), fuse_as_torch(layer, norm)(x)
    assert type(folded[0]) is type(layer) and isinstance(folded[1], nn.Identity)
    assert output.dtype == dtype
    error, *errors = ((t - exact).abs() for t in (output, *others))
    assert error.square().mean() <= 1.05**2 * max(e.square().mean() for e in errors)
    assert error.max() <= max(e.max() for e in errors) + ulp(dtype, exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Conv2d, groups", "ConvTranspose2d, groups", "Linear"])
def test_weights_are_rounded_once(name, dtype):
    """Those of float64, folded again by torch's functions or group by group, round to the same bits."""
    make, shape = LAYERS[name]
    layer = make(dtype=dtype)
    norm = STOCK[len(shape)](4, dtype=torch.promote_types(dtype, torch.float32))
    model = filled(nn.Sequential(layer, norm))
    folded = fastbn.fold(model)[0]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = layer.weight.detach().double()
    if isinstance(layer, TRANSPOSED):
        groups = zip(weight.chunk(layer.groups), scale.chunk(layer.groups), strict=True)
        exact = torch.cat([w * s.view(1, -1, 1, 1) for w, s in groups])
    else:
        exact = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    # Where float64 is the dtype itself, sqrt and rsqrt may differ by an ulp.
    exact_bits = {"rtol": 1e-15, "atol": 0} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(folded.weight.detach(), exact.to(dtype), **exact_bits)


def test_memory_format_and_requires_grad_of_a_weight_stay():
    model = conv_bn().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    conv = fastbn.fold(model)[0]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    assert not conv.weight.requires_grad


@pytest.mark.parametrize("param", [None, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_stays_in_the_place_of_the_layer(activation, param):
    if param is not None and ROWS[ACTIVATIONS.index(activation)].default_param is None:
        param = None
    norm = fastbn.BatchNorm2d(5, activation=activation, activation_param=param)
    model = conv_bn(norm=norm)
    folded = fastbn.fold(model)
    assert type(folded[1]) is MODULES[activation] and not folded[1].training
    torch.testing.assert_close(folded(images()), model(images()))


def test_every_activation_has_a_module():
    assert set(MODULES) == set(ACTIVATIONS) and PIECEWISE_LINEAR < set(MODULES)


class Residual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), fastbn.BatchNorm2d(3, activation=activation)

    def forward(self, x):
        return self.norm(self.conv(x), residual=x)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_residual_is_added_before_the_activation(activation):
    model = filled(Residual(activation))
    folded = fastbn.fold(model)
    assert type(folded.norm) is FoldedBatchNorm
    torch.testing.assert_close(folded(images()), model(images()))


def _norm_of_torchvision():
    from torchvision.ops import misc

    return misc.FrozenBatchNorm2d(5)


def _norm_of_detectron2(monkeypatch):
    """Return a module as detectron2's, of that name: its package is not on the package index."""

    class FrozenBatchNorm2d(fastbn.FrozenBatchNorm2d):
        def forward(self, x):
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    FrozenBatchNorm2d.__module__, FrozenBatchNorm2d.__qualname__ = "detectron2.layers.batch_norm", "FrozenBatchNorm2d"
    module = types.ModuleType("detectron2.layers.batch_norm")
    module.FrozenBatchNorm2d = FrozenBatchNorm2d
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return FrozenBatchNorm2d(5)


def _norm_of_timm(name, **options):
    from timm.layers import norm_act

    return getattr(norm_act, name)(5, **options)


NORMS = {
    "nn.BatchNorm2d": lambda _: nn.BatchNorm2d(5),
    "nn.SyncBatchNorm": lambda _: nn.SyncBatchNorm(5),
    "BatchNorm2d": lambda _: fastbn.BatchNorm2d(5),
    "BatchRenorm2d": lambda _: fastbn.BatchRenorm2d(5),
    "GhostBatchNorm2d": lambda _: fastbn.GhostBatchNorm2d(5, virtual_batch_size=2),
    "FrozenBatchNorm2d": lambda _: fastbn.FrozenBatchNorm2d(5, activation="relu"),
    "frozen": lambda _: fastbn.freeze(nn.BatchNorm2d(5)),
    "torchvision": lambda _: _norm_of_torchvision(),
    "detectron2": _norm_of_detectron2,
    "timm": lambda _: _norm_of_timm("BatchNormAct2d", act_layer=nn.SiLU),
    "timm, frozen": lambda _: _norm_of_timm("FrozenBatchNormAct2d"),
    "timm, no activation": lambda _: _norm_of_timm("BatchNormAct2d", apply_act=False),
    "checkpoint-safe": lambda _: fastbn.checkpoint_safe(fastbn.BatchNorm2d(5, activation="silu")),
    "a subclass": lambda _: type("Mine", (nn.BatchNorm2d,), {"extra": 1})(5),
    "no bias": lambda _: _without_bias(),
}


def _without_bias():
    norm = nn.BatchNorm2d(5)
    norm.bias = None
    return norm


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs(name.split(",")[0])) if name.startswith(("timm", "torchvision")) else name
        for name in NORMS
    ],
)
def test_kinds_of_batch_norm(name, monkeypatch):
    model = conv_bn(norm=NORMS[name](monkeypatch))
    folded = fastbn.fold(model)
    assert not any(hasattr(module, "running_mean") for module in folded.modules())
    torch.testing.assert_close(folded(images()), model(images()))


def test_the_model_itself_is_left_alone():
    model = conv_bn(nn.ReLU())
    before, types_before = copy.deepcopy(model.state_dict()), [type(m) for m in model]
    folded = fastbn.fold(model)
    assert folded is not model and [type(m) for m in model] == types_before
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert pointers.isdisjoint(t.data_ptr() for t in folded.state_dict().values())


def test_in_place():
    model = conv_bn(nn.ReLU())
    expected, modules = model(images()), list(model)
    assert fastbn.fold(model, inplace=True) is model and list(model) == modules
    assert [type(m) for m in model] == [nn.Conv2d, nn.Identity, nn.ReLU]
    torch.testing.assert_close(model(images()), expected)


def test_names_of_the_others_stay():
    model = conv_bn(nn.ReLU(), nn.Conv2d(5, 2, 1))
    folded = fastbn.fold(model)
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_a_second_fold_changes_nothing():
    folded = fastbn.fold(conv_bn())
    again = fastbn.fold(folded)
    assert all(torch.equal(t, folded.state_dict()[name]) for name, t in again.state_dict().items())
    assert examine(folded).folded == () and examine(folded).left == ()


def test_a_layer_elsewhere_that_refers_to_the_norm_sees_the_change():
    model = conv_bn()
    model.alias = [model[1]]  # no child: plain Python
    folded = fastbn.fold(model)
    assert folded.alias[0] is folded[1] and type(folded.alias[0]) is nn.Identity


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_in_training_mode_is_refused_and_not_changed(inplace):
    model = conv_bn()
    model[1].train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^fold: expected a model in evaluation mode .*, got 1 in training mode$"):
        fastbn.fold(model, inplace=inplace)
    with pytest.raises(ValueError, match=r"got \(the model itself\) and 2 more in training mode$"):
        examine(model.train())
    assert type(model[1]) is nn.BatchNorm2d
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("call", [fastbn.fold, examine])
def test_only_modules(call):
    with pytest.raises(TypeError, match="fold: expected a torch.nn.Module, got dict"):
        call({})


def test_behind_a_linear_the_number_of_dimensions_is_checked():
    """BatchNorm1d would normalise dimension 1 of (N, L, C), which need not be the Linear's output."""
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    folded = fastbn.fold(model)
    torch.testing.assert_close(folded(normal(5, 3).float()), model(normal(5, 3).float()))
    model(normal(5, 4, 3).float())
    with pytest.raises(AssertionError, match="expected an input of other dimensions"):
        folded(normal(5, 4, 3).float())


@pytest.mark.parametrize("model", [lambda: filled(Residual("relu")), lambda: conv_bn(nn.ReLU())], ids=["add", "plain"])
def test_tools_take_a_folded_model(model):
    model = model()
    folded, x = fastbn.fold(model), images()
    expected = model(x)
    stream = io.BytesIO()
    torch.save(folded, stream)
    stream.seek(0)
    followers = {
        "deepcopy": copy.deepcopy(folded),
        "pickle": pickle.loads(pickle.dumps(folded)),
        "torch.save": torch.load(stream, weights_only=False),
        "fx": fx.symbolic_trace(folded),
        "script": torch.jit.script(folded),
        "trace": torch.jit.trace(folded, x),
        "export": torch.export.export(folded, (x,)).module(),
        "channels_last": folded.to(memory_format=torch.channels_last),
    }
    for name, follower in followers.items():
        torch.testing.assert_close(follower(x), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_guarded_layer_is_scripted_and_exported():
    model = filled(nn.Sequential(nn.Linear(3, 4), fastbn.BatchNorm1d(4, activation="relu")))
    folded, x = fastbn.fold(model), normal(5, 3).float()
    for follower in (torch.jit.script(folded), fx.symbolic_trace(folded), torch.export.export(folded, (x,)).module()):
        torch.testing.assert_close(follower(x), model(x))
    with pytest.raises(torch.jit.Error, match="AssertionError"):
        torch.jit.script(folded)(normal(5, 4, 3).float())


def test_a_compiled_folded_model_is_one_graph():
    torch._dynamo.reset()
    model = filled(Residual("relu"))
    compiled = torch.compile(fastbn.fold(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))
