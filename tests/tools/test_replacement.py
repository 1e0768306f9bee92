"""What replaces or folds BatchNorm layers: plain ones as torch's, and none with an activation that it would lose."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import fastbn
from tests.packages import needs
from tests.tools.models import images, layers, pair

REFUSED = r"expected a layer without an activation where (eps|num_features) is read.*fastbn\.fold.*fastbn\.reverted"


def _with_activation():
    return nn.Sequential(nn.Conv2d(3, 4, 1), fastbn.BatchNorm2d(4, activation="relu"))


def _fuse_conv_bn_eval(model):
    model.eval()
    model[0].conv1, model[0].bn1 = fuse_conv_bn_eval(model[0].conv1, model[0].bn1), nn.Identity()
    return model


def _fuse_conv_and_bn_of_ultralytics(model):
    from ultralytics.utils.torch_utils import fuse_conv_and_bn

    model.eval()
    model[0].conv1, model[0].bn1 = fuse_conv_and_bn(model[0].conv1, model[0].bn1), nn.Identity()
    return model


def _freeze_batch_norm_2d_of_timm(model):
    from timm.layers import freeze_batch_norm_2d

    return freeze_batch_norm_2d(model)


def _convert_sync_batchnorm(model):
    # Its layers normalise in evaluation as any, and without GPUs only there.
    return nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()


def _convert_sync_batchnorm_of_timm(model):
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model).eval()


def _replace_batch_norm_of_transformers(model):
    from transformers.models.detr.modeling_detr import replace_batch_norm

    replace_batch_norm(model)
    return model


def _fix_of_opacus(model):
    from opacus.validators import ModuleValidator

    fastbn.register_with_tools()
    return ModuleValidator.fix(model.train())


TOOLS = {
    "fuse_conv_bn_eval": _fuse_conv_bn_eval,
    "ultralytics.fuse_conv_and_bn": _fuse_conv_and_bn_of_ultralytics,
    "timm.freeze_batch_norm_2d": _freeze_batch_norm_2d_of_timm,
    "convert_sync_batchnorm": _convert_sync_batchnorm,
    "timm.convert_sync_batchnorm": _convert_sync_batchnorm_of_timm,
    "transformers.replace_batch_norm": _replace_batch_norm_of_transformers,
    "opacus.fix": _fix_of_opacus,
}
PARAMS = [pytest.param(tool, marks=needs(tool.split(".")[0])) if "." in tool else tool for tool in TOOLS]


@pytest.mark.parametrize("tool", PARAMS)
def test_plain_layers_are_replaced_as_torchs(tool):
    stock, fast = pair()
    replaced = [TOOLS[tool](model) for model in (stock, fast)]
    kinds = [[type(module) for module in model[0].children()] for model in replaced]
    assert kinds[1][:4] == kinds[0][:4] and type(replaced[1][0].bn1) not in (nn.BatchNorm2d, fastbn.BatchNorm2d)
    if tool != "opacus.fix":  # which makes new layers
        torch.testing.assert_close(replaced[1](images()), replaced[0](images()))


@pytest.mark.parametrize("tool", PARAMS)
def test_layers_with_an_activation_are_refused(tool):
    """In a sentence that says what to do; none leaves the activation out."""
    _, model = pair()
    model[0].bn1.activation = "relu"
    with pytest.raises(TypeError, match=REFUSED):
        TOOLS[tool](model)


class WithResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), fastbn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn1(self.conv1(x), x)


@pytest.mark.parametrize("tool", PARAMS)
def test_a_residual_that_is_lost_is_an_error(tool):
    """A call with a residual does not fit what has replaced the layer."""
    replaced = TOOLS[tool](nn.Sequential(WithResidual()))
    with pytest.raises(TypeError, match=r"forward\(\) takes 2 positional arguments but 3 were given"):
        replaced(images())


@pytest.mark.parametrize("tool", PARAMS)
def test_a_reverted_model_is_torchs(tool):
    stock, fast = pair()
    expected = TOOLS[tool](stock)
    with fastbn.reverted(fast):
        replaced = TOOLS[tool](fast)
    assert [type(module) for module in replaced[0].children()][:4] == [
        type(module) for module in expected[0].children()
    ][:4]


def test_fuse_linear_bn_eval():
    linear, norm = nn.Linear(3, 4).eval(), fastbn.BatchNorm1d(4).eval()
    norm.running_mean.fill_(0.3)
    x = torch.randn(5, 3)
    torch.testing.assert_close(fuse_linear_bn_eval(linear, norm)(x), norm(linear(x)))
    norm.activation = "relu"
    with pytest.raises(TypeError, match=REFUSED):
        fuse_linear_bn_eval(linear, norm)


def test_fuse_of_torch_fx():
    """It knows layers by their exact type: fastbn's it leaves, which is right but not fused."""
    from torch.fx.experimental.optimization import fuse

    stock, fast = (model.eval() for model in pair())
    assert len(layers(fuse(stock))) == 0 and len(layers(fuse(fast))) == 2
    torch.testing.assert_close(fuse(fast)(images()), stock(images()))
    with fastbn.reverted(fast):
        fused = fuse(fast)
    assert len(layers(fused)) == 0 and type(layers(fast)[0]) is fastbn.BatchNorm2d
    torch.testing.assert_close(fused(images()), stock(images()))


def test_functorch_takes_the_running_statistics_away():
    _, fast = pair()
    torch.func.replace_all_batch_norm_modules_(fast)
    assert all(layer.running_mean is None for layer in layers(fast))


@needs("opacus")
def test_opacus_validator():
    from opacus.validators import ModuleValidator

    stock, fast = pair()
    assert "opacus.validators.module_validator.ModuleValidator.VALIDATORS" in fastbn.register_with_tools()
    messages = [sorted(map(str, ModuleValidator.validate(model.train()))) for model in (stock, fast)]
    assert messages[0] == messages[1] and len(messages[0]) >= 2


def test_nothing_is_imported_to_be_told(monkeypatch):
    import sys

    for name in ("thop.profile", "opacus.validators.module_validator"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    assert fastbn.register_with_tools() == [] and set(sys.modules) == before
