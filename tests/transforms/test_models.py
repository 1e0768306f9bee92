"""Models of other libraries: what docs/models.md counts, asked of docs/models.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.packages import needs

spec = importlib.util.spec_from_file_location("docs_models", Path(__file__).parents[2] / "docs" / "models.py")
models = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = models
spec.loader.exec_module(models)


def model_of(package, name):
    (model,) = [model for model in models.GROUPS[package]() if model.name == name]
    return model


# (package, model, fused with: activation, addition, both; alone). Of two that are added one stays alone.
MODELS = [
    ("torchvision", "resnet50", 33, 0, 16, 4),
    ("torchvision", "mobilenet_v2", 35, 10, 0, 7),
    ("torchvision", "efficientnet_b0", 33, 9, 0, 7),
    ("torchvision", "densenet121", 121, 0, 0, 0),
    ("torchvision", "resnet18_fpn, frozen BN", 9, 0, 8, 3),
    ("timm", "efficientnet_b0", 33, 9, 0, 7),
    ("timm", "darknet53", 52, 0, 0, 0),
    ("transformers", "ResNetModel", 9, 0, 4, 1),
    ("transformers", "MobileNetV2Model", 35, 10, 0, 7),
    ("torch_geometric", "GIN", 5, 0, 0, 0),
    ("segmentation_models_pytorch", "Unet, resnet18", 19, 0, 8, 3),
    ("ultralytics", "yolov8n", 57, 0, 0, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "package, name, activation, addition, both, alone",
    [pytest.param(*model, id=model[1], marks=needs(model[0])) for model in MODELS],
)
def test_what_is_fused(package, name, activation, addition, both, alone):
    found = models.count(model_of(package, name))
    counts = [found.fused[kind] for kind in ("activation", "addition", "addition+activation", "")]
    assert counts == [activation, addition, both, alone]
    assert found.fused_calls == found.fusable and not found.left


@pytest.mark.parametrize("name", ["DCGAN generator", "DCGAN discriminator"])
def test_a_small_row(name):
    found = models.measure(model_of("torch", name), models.Budget(seconds=0.05, min_rounds=3))
    assert found.fused_calls == found.fusable == found.layers
    for fast, stock in zip(found.errors["fast"], found.errors["stock"], strict=True):
        assert fast < 2 * stock + 1e-7
    assert 0.05 < found.speedup < 50 and f"| {found.speedup:.2f} |" in models.line(found)


def test_the_page_has_every_model_that_is_installed():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for package, name, *_ in MODELS:
        assert f"| {package} | {name} |" in page
