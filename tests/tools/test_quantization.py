"""torch.ao.quantization, which knows layers by their exact type, on a model that is reverted for it."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

import fastbn
from tests.packages import needs
from tests.tools.models import images, layers, pair

quantization = pytest.importorskip("torch.ao.quantization", reason="needs a torch with torch.ao.quantization")

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = [["0.conv1", "0.bn1"], ["0.conv2", "0.bn2"]]


def _qconfig_mapping(qat):
    get = quantization.get_default_qat_qconfig_mapping if qat else quantization.get_default_qconfig_mapping
    return get("x86")


def test_fuse_modules():
    stock, fast = (model.eval() for model in pair())
    with pytest.raises((AssertionError, NotImplementedError), match="did not find fuser method|Cannot fuse modules"):
        quantization.fuse_modules(fast, NAMES)
    with fastbn.reverted(fast):
        fused = quantization.fuse_modules(fast, NAMES)
    assert not layers(fused) and len(layers(fast)) == 2 and type(layers(fast)[0]) is fastbn.BatchNorm2d
    torch.testing.assert_close(fused(images()), stock(images()))


def test_fuse_modules_qat():
    stock, fast = pair()
    with pytest.raises((AssertionError, NotImplementedError), match="did not find fuser method|Cannot fuse modules"):
        quantization.fuse_modules_qat(fast, NAMES)
    with fastbn.reverted(fast):
        fused = quantization.fuse_modules_qat(fast, NAMES)
    assert type(fused[0].conv1).__name__ == "ConvBn2d"
    torch.testing.assert_close(fused(images()), stock(images()))


@pytest.mark.parametrize("qat", [False, True], ids=["prepare_fx", "prepare_qat_fx"])
def test_prepare_fx(qat):
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

    prepare = prepare_qat_fx if qat else prepare_fx
    stock, fast = (model.train(qat) for model in pair())
    with fastbn.reverted(fast):
        prepared = prepare(copy.deepcopy(fast), _qconfig_mapping(qat), (images(),))
    expected = prepare(copy.deepcopy(stock), _qconfig_mapping(qat), (images(),))
    assert prepared.code == expected.code
    torch.testing.assert_close(prepared(images()), expected(images()), rtol=1e-3, atol=1e-3)
    assert not layers(convert_fx(prepared.eval()))


def test_prepare_fx_leaves_layers_that_it_does_not_know():
    """Right, but neither folded nor quantised: revert the model for it."""
    from torch.ao.quantization.quantize_fx import prepare_fx

    stock, fast = (model.eval() for model in pair())
    prepared = prepare_fx(copy.deepcopy(fast), _qconfig_mapping(False), (images(),))
    assert len(layers(prepared)) == 2
    torch.testing.assert_close(prepared(images()), stock(images()))


def _prepare_pt2e(model, qat):
    from torchao.quantization.pt2e import quantize_pt2e as pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as inductor

    model = nn.Sequential(model[0].conv1, model[0].bn1, model[0].relu).train(qat)
    quantizer = inductor.X86InductorQuantizer()
    quantizer.set_global(inductor.get_default_x86_inductor_quantization_config(is_qat=qat))
    prepare = pt2e.prepare_qat_pt2e if qat else pt2e.prepare_pt2e
    with fastbn.reverted(model) if qat else contextlib.nullcontext():
        program = torch.export.export(model, (images(),)).module()
    return prepare(program, quantizer)


@pytest.mark.slow
@needs("torchao")
@pytest.mark.parametrize("qat", [False, True], ids=["prepare_pt2e", "prepare_qat_pt2e"])
def test_pt2e(qat):
    """An exported program has torch's batch_norm; for training the quantizer also asks which module it came from."""
    stock, fast = (_prepare_pt2e(model, qat) for model in pair())
    assert stock.code == fast.code
    torch.testing.assert_close(fast(images()), stock(images()), rtol=1e-3, atol=1e-3)


def test_dynamic_quantization_of_the_rest():
    results = []
    for model in pair():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)(images()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
