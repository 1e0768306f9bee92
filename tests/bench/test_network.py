"""bench/resnet50.py is ResNet-50, plain and fused alike; bench/network.py refuses what is not, and times the rest."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastbn
from bench import network, resnet50
from bench.network import COMPILED, CONVERT, FUSED, OWN_SOURCE, TORCH, NetworkCase, Profile, Training
from bench.timer import Budget
from bench.workloads import dtype_name

CPU = torch.device("cpu")
# 8 images of 32 give the last BatchNorms 8 values per channel; with two, rounding errors would be as large as values.
CASE = NetworkCase(8, 32, torch.float32)
BRIEF = Budget(seconds=0, warm_up_seconds=0, min_rounds=3, max_rounds=3)
# Rounding errors grow by some 1e4 through an untrained ResNet-50, by ten times that back to the first gradients, and
# BatchNorm of few values makes it up to ten times more.
AMPLIFICATION = 1e6


@pytest.fixture(scope="module")
def models():
    """Make a plain and a fused model from one state_dict."""
    torch.manual_seed(0)
    plain, fused = resnet50.ResNet50(resnet50.PLAIN), resnet50.ResNet50(resnet50.FUSED)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def _batch(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=dtype)
    return images.to(memory_format=torch.channels_last), torch.randint(1000, (8,), generator=generator)


def _shrink(monkeypatch):
    """Leave one narrow block per stage, which takes seconds less per test. torchvision has no such network."""
    monkeypatch.setattr(resnet50, "STAGES", ((8, 1, 1), (16, 1, 2), (32, 1, 2), (64, 1, 2)))
    monkeypatch.setitem(sys.modules, "torchvision", None)


def test_is_resnet50(models):
    for model in models:
        parameters = dict(model.named_parameters())
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        assert sum(parameter.numel() for parameter in parameters.values()) == 25_557_032
        assert len(parameters) == 161 and len(norms) == 53 and len(shapes) == 161 + 3 * 53
        assert list(shapes)[:2] == ["conv1.weight", "bn1.weight"] and list(shapes)[-2:] == ["fc.weight", "fc.bias"]
        assert shapes["conv1.weight"] == (64, 3, 7, 7) and shapes["fc.weight"] == (1000, 2048)
        assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
        assert shapes["layer2.0.downsample.1.running_var"] == (512,)
        assert shapes["layer3.5.conv2.weight"] == (256, 256, 3, 3) and shapes["layer4.2.bn3.bias"] == (2048,)
        assert model.layer2[0].conv1.stride == (1, 1) and model.layer2[0].conv2.stride == (2, 2)  # v1.5
    assert sum(getattr(module, "activation", None) == "relu" for module in models[1].modules()) == 49


@pytest.mark.slow
def test_plain_and_fused_agree(models):
    images, labels = _batch(torch.float64)
    results = []
    for model in models:
        training = Training(model, "", images, labels, torch.float32)
        results.append(network.float64_pass(training))
        model = copy.deepcopy(model).double().eval()
        for name, buffer in model.named_buffers():
            buffer.copy_(results[-1][name])  # not those of a new model
        with torch.no_grad():
            results[-1]["the logits in eval"] = model(images)
    plain, fused = results
    assert plain.keys() == fused.keys() and len(plain) == 1 + 161 + 3 * 53 + 1
    for name, tensor in plain.items():
        error = torch.dist(tensor.double(), fused[name].double()) / tensor.double().norm()
        assert error < AMPLIFICATION * torch.finfo(torch.float64).eps, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "case,device",
    [
        (CASE, "cpu"),
        (NetworkCase(8, 32, torch.bfloat16, "contiguous"), "cpu"),
        pytest.param(NetworkCase(16, 64, torch.float32), "cuda", marks=pytest.mark.gpu),
        pytest.param(NetworkCase(16, 64, torch.bfloat16), "cuda", marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_measure(case, device, monkeypatch):
    if device == "cpu":
        _shrink(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    random_state = torch.random.get_rng_state()
    steps, refusals = network.measure(case, torch.device(device), BRIEF)
    assert not torch.backends.cudnn.benchmark
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not refusals
    names = [TORCH, CONVERT, FUSED, *(COMPILED if device == "cuda" else ())]
    assert [step.implementation for step in steps] == names
    for step in steps:
        assert (step.network, step.batch, step.image_size) == ("resnet50", case.batch, case.image_size)
        assert (step.dtype, step.layout) == (dtype_name(case.dtype), case.layout)
        assert 0 < step.p20_us <= step.median_us <= step.p80_us and step.rounds == 3
        assert step.norm_share is None if step.implementation in COMPILED else 0 < step.norm_share < 1
        assert 5 < step.first_loss < 10  # about log(1000), for random labels
        assert step.peak_bytes is None if device == "cpu" else step.peak_bytes > 0
        assert step.speedup_over.keys() == {*names} - {step.implementation}
        assert all(ratio > 0 for ratio in step.speedup_over.values())
    assert steps[2].source == OWN_SOURCE


@pytest.mark.slow
def test_compiled_steps_agree_with_eager_ones(monkeypatch):
    _shrink(monkeypatch)
    calls = []

    def compile(model, options=None):
        def backend(graph_module, inputs):
            if options is not None:
                options["pre_grad_custom_pass"](graph_module.graph)
                graph_module.recompile()
            calls.append(sum(node.target is fastbn.functional.batch_norm for node in graph_module.graph.nodes))
            return aot_eager(graph_module, inputs)

        return real_compile(model, backend=backend)

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    images, labels = _batch(torch.float32)
    torch.manual_seed(0)
    stock = resnet50.ResNet50(resnet50.PLAIN)
    eager = Training(copy.deepcopy(stock), OWN_SOURCE, images, labels, torch.float32)
    eager.step()
    compiled = network._compiled(stock, OWN_SOURCE, images, labels, torch.float32)
    for training in compiled.values():
        training.step()
        assert training.loss.item() == pytest.approx(eager.loss.item(), rel=network.loss_tolerance(torch.float32, CPU))
        assert network.norm_share(training) is None
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in stock.modules())
    assert list(compiled) == list(COMPILED)
    assert (calls[0], calls[-1]) == (0, norms)


@pytest.mark.slow
def test_a_network_without_one_of_its_residuals_is_refused(monkeypatch):
    _shrink(monkeypatch)
    style = resnet50.FUSED

    def norm_relu(norm, input, residual=None):
        return style.norm_relu(norm, input, None if input.size(1) == 128 else residual)

    monkeypatch.setattr(resnet50, "FUSED", resnet50.NormStyle(style.norm, style.norm_before_relu, norm_relu))
    steps, refusals = network.measure(CASE, CPU, BRIEF)
    assert [step.implementation for step in steps] == [TORCH, CONVERT]
    assert [(refusal.implementation, refusal.wrong) for refusal in refusals] == [(FUSED, True)]
    assert "in float64, the logits" in refusals[0].reason


def test_a_loss_that_is_off_or_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(network, "float64_pass", lambda training: {})
    losses = {TORCH: 7.0, CONVERT: 7.1, FUSED: float("nan")}
    trainings = {
        name: types.SimpleNamespace(step=lambda: None, loss=torch.tensor(loss)) for name, loss in losses.items()
    }
    refusals = network._gate(trainings, CASE, CPU)
    assert [(refusal.implementation, refusal.wrong) for refusal in refusals] == [(CONVERT, True), (FUSED, True)]


@pytest.mark.slow
def test_only_torch_is_timed_where_fastbn_has_no_kernels(monkeypatch):
    _shrink(monkeypatch)
    monkeypatch.setattr(network, "serving", lambda device: (None, "there are none"))
    steps, refusals = network.measure(CASE, CPU, BRIEF)
    assert [step.implementation for step in steps] == [TORCH]
    assert [(refusal.wrong, refusal.reason) for refusal in refusals] == 2 * [(False, "there are none")]


def test_norm_share_counts_neither_the_optimizer_nor_sums_of_gradients(monkeypatch):
    profiles = {
        "forward": Profile({"aten::add_": 1, "aten::relu_": 2, "aten::native_batch_norm": 4, "aten::conv2d": 100}, 107),
        "backward": Profile(
            {"aten::add_": 100, "aten::threshold_backward": 8, "fastbn::batch_norm_backward": 16, "aten::copy_": 1}, 125
        ),
        "update": Profile({"aten::add_": 50, "aten::_foreach_add_": 50}, 100),
    }
    monkeypatch.setattr(network, "profiled", lambda run, device: profiles[run])
    training = types.SimpleNamespace(
        images=torch.empty(0), is_compiled=False, forward="forward", backward="backward", update="update"
    )
    assert network.norm_share(training) == pytest.approx((1 + 2 + 4 + 8 + 16) / (107 + 125 + 100))
    empty = Profile({}, 0)
    monkeypatch.setattr(network, "profiled", lambda run, device: empty)
    assert network.norm_share(training) is None


@pytest.mark.slow
def test_norm_ops_of_a_step(models):
    images, labels = _batch(torch.float32)
    counted = []
    for model in models:
        training = Training(model, "", images, labels, torch.float32)
        passes = [network.profiled(training.forward, CPU), network.profiled(training.backward, CPU)]
        model.zero_grad()
        counted.append([{op for op in passes[i].by_op if network.is_norm_op(op, forward=i == 0)} for i in range(2)])
    plain, fused = counted
    assert {"aten::native_batch_norm", "aten::relu_", "aten::add_"} < plain[0]
    assert plain[1] == {"aten::native_batch_norm_backward", "aten::threshold_backward"}
    assert fused == [{"fastbn::batch_norm_train"}, {"fastbn::batch_norm_backward"}]


def test_torchvision_is_the_stock_model_where_it_is_installed(models, monkeypatch):
    plain, fused = models
    module = types.ModuleType("torchvision")
    module.__version__, module.models = "1.2.3", types.SimpleNamespace(resnet50=lambda: fused)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    assert network._stock(plain) == (fused, "torchvision 1.2.3")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if not installed
    assert network._stock(plain) == (plain, OWN_SOURCE)


def test_cases_that_are_refused():
    with pytest.raises(ValueError, match="expected a dtype"):
        NetworkCase(1, 32, torch.float16)
    with pytest.raises(ValueError, match="expected a layout"):
        NetworkCase(1, 32, torch.float32, "strided")
