"""fastbn.doctor: every planted fault is found once, at its layer; near misses are not; and nothing is changed."""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbn
from fastbn.inspect.doctor import FAULTS, SEVERITIES
from fastbn.inspect.doctor.twins import twin_of
from tests.inspect import planted
from tests.packages import needs

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


def codes(diagnosis):
    """Return how often each (code, layer) was found."""
    return Counter((found.code, found.layer) for found in diagnosis.findings)


def moved(norm, batches=100):
    """Return a BatchNorm with the statistics of a trained one."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    norm.num_batches_tracked.fill_(batches)
    return norm


def test_every_planted_fault_is_found_once():
    diagnosis = fastbn.doctor(planted.Faulty(), planted.SHAPE)
    assert codes(diagnosis) == Counter(planted.FINDINGS)
    assert diagnosis.layers == 25 and not diagnosis.left_out


@pytest.mark.parametrize("make", [planted.evaluated, planted.checkpoint], ids=["evaluated", "checkpoint"])
def test_faults_of_evaluation_and_of_a_checkpoint(make):
    model, expected = make()
    assert codes(fastbn.doctor(model)) == Counter(expected)


def test_every_fault_is_planted():
    known = {code for code, _ in planted.FINDINGS | planted.evaluated()[1] | planted.checkpoint()[1]}
    assert known == set(FAULTS)


class _Residual(nn.Module):
    """What `convert` gives another forward, with a bias that does nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = _conv(bias=True), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


def test_faults_are_found_in_converted_models_too():
    model = fastbn.convert(planted.Faulty())
    assert codes(fastbn.doctor(model, planted.SHAPE)) == Counter(planted.FINDINGS)
    model = fastbn.convert(_Residual())
    assert type(model) is not _Residual
    assert codes(fastbn.doctor(model, (4, 8, 4, 4))) == {("bias-before-norm", "conv"): 1}


def test_what_two_checks_see_of_a_layer_is_one_finding_and_two_bad_tensors_are_two():
    norm = _with_running(running_mean=torch.nan, weight=torch.inf)
    assert codes(fastbn.doctor(norm)) == {("not-finite", ""): 2}
    layers = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    twice = nn.Sequential(layers[0], layers[1], layers[0], nn.BatchNorm2d(8))
    (found,) = fastbn.doctor(twice, (4, 8, 4, 4)).findings
    assert (found.code, found.layer, found.message) == (
        "shared-layer",
        "0",
        "the layer is called 2 times in one forward",
    )


def test_faults_are_in_order_and_say_what_to_do():
    diagnosis = fastbn.doctor(planted.Faulty(), planted.SHAPE)
    order = [SEVERITIES.index(found.severity) for found in diagnosis.findings]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    assert all(found.message and found.why.endswith(".") and found.advice.endswith(".") for found in diagnosis.findings)
    assert [len(diagnosis.at_least(severity)) for severity in SEVERITIES] == [7, 20, 24]
    text = str(diagnosis)
    assert "7 errors, 13 warnings, 4 notes." in text and all(found.layer in text for found in diagnosis.findings)
    assert max(map(len, text.splitlines())) <= 120


def _snapshot(model):
    """Return everything of a model that an examination might change."""
    tensors = {
        name: (id(t), t._version, t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()
    }
    modules = {
        name: (id(module), type(module), {key: id(value) for key, value in vars(module).items()}, module.training)
        for name, module in model.named_modules()
    }
    hooks = [list(module._forward_hooks.items()) for module in model.modules()]
    return tensors, modules, hooks


@pytest.mark.parametrize("training", [None, True, False])
def test_the_model_is_left_as_it_is(training):
    model = planted.Faulty()
    calls = []
    model.sound.register_forward_hook(lambda *args: calls.append(1))
    state, numbers = torch.get_rng_state(), random.getstate()
    before = _snapshot(model)
    fastbn.doctor(model, planted.SHAPE, training=training)
    after = _snapshot(model)
    assert before[1:] == after[1:]
    for (a, version_a, value_a, grad_a), (b, version_b, value_b, grad_b) in zip(
        before[0].values(), after[0].values(), strict=True
    ):
        assert a == b and version_a == version_b and grad_a == grad_b
        assert (
            torch.equal(value_a.view(torch.uint8), value_b.view(torch.uint8)) if value_a.dim() else value_a == value_b
        )
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == numbers
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_that_draws_numbers_leaves_the_generators():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) * random.random() + torch.rand(())

    state, numbers = torch.get_rng_state(), random.getstate()
    fastbn.doctor(Draws(), (4, 3, 5, 5))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == numbers


def _conv(bias=False, out=8):
    return nn.Conv2d(8, out, 1, bias=bias)


def _tail(*modules):
    """Return a sound network that contains `modules`, in which two more layers come before their activation."""
    unit = [_conv(), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*modules, *unit, *copy.deepcopy(unit))


class _TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = _conv(bias=True), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


def _with_running(**values):
    norm = moved(nn.BatchNorm2d(8))
    with torch.no_grad():
        for name, value in values.items():
            getattr(norm, name).fill_(value)
    return norm.eval()


def _zero_channel(weight):
    norm = _with_running()
    with torch.no_grad():
        norm.running_var[1], norm.weight[1] = 0, weight
    return norm


class _StaysFrozen(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


NEAR_MISSES = {
    "fresh": lambda: _tail(),
    "fresh in both modes": lambda: nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm1d(8)]),
    "a bias that something else reads": _TwoReaders,
    "a bias before a frozen layer": lambda: _tail(_conv(bias=True), fastbn.FrozenBatchNorm2d(8), nn.ReLU()),
    "a bias before a frozen layer in evaluation": lambda: nn.Sequential(
        _conv(bias=True), fastbn.FrozenBatchNorm2d(8), nn.ReLU()
    ).eval(),
    "a bias before a layer in evaluation mode": lambda: _StaysFrozen(
        _conv(bias=True), moved(nn.BatchNorm2d(8))
    ).train(),
    "a bias after the layer": lambda: _tail(nn.BatchNorm2d(8), _conv(bias=True), nn.ReLU()),
    "a bias with an activation between": lambda: nn.Sequential(_conv(bias=True), nn.ReLU(), nn.BatchNorm2d(8)),
    "all layers after their activation": lambda: nn.Sequential(
        *(_conv(), nn.GELU(), nn.BatchNorm2d(8), _conv(), nn.GELU(), nn.BatchNorm2d(8))
    ),
    "a layer before its activation and a convolution": lambda: _tail(nn.BatchNorm2d(8), nn.ReLU(), _conv()),
    "a dropout that drops nothing": lambda: _tail(nn.Dropout(0.0), nn.BatchNorm2d(8), nn.ReLU()),
    "a dropout after": lambda: _tail(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
    "a variance of 1e8": lambda: _with_running(running_var=1e8),
    "a tiny variance": lambda: _with_running(running_var=1e-30),
    "a mean of 65504": lambda: _with_running(running_mean=-65504),
    "a channel that is switched off": lambda: _zero_channel(1e-4),
    "a small eps": lambda: nn.BatchNorm2d(8, eps=1e-12),
    "a momentum of one half": lambda: nn.BatchNorm2d(8, momentum=0.5),
    "cumulative averages": lambda: moved(nn.BatchNorm2d(8, momentum=None)),
    "no affine, and parameters that are not trained": lambda: nn.Sequential(
        nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1).requires_grad_(False)
    ),
    "a bias that is trained beside a constant weight": lambda: _constant_weight(),
    "a small weight": lambda: _with_running(weight=1e-3),
    "a fresh weight of 0": lambda: _zero_initialised(),
    "frozen by fastbn": lambda: fastbn.freeze(_tail(moved(nn.BatchNorm2d(8)))[:1]).train(),
    "a model whose train() keeps it frozen": lambda: _StaysFrozen(_conv(), moved(nn.BatchNorm2d(8))).train(),
    "a momentum of 0 in a frozen layer": lambda: fastbn.freeze(moved(nn.BatchNorm2d(8, momentum=0.0))),
    "a counter of an old checkpoint": lambda: moved(nn.BatchNorm2d(8), batches=0),
    "an activation of its own": lambda: _tail(fastbn.BatchNorm2d(8, activation="relu"), nn.Dropout(0.5)),
    "InstanceNorm": lambda: nn.Sequential(_conv(bias=True), nn.InstanceNorm2d(8), nn.ReLU()),
}


def _constant_weight():
    model = _tail()
    model[1].weight.requires_grad_(False)
    return model


def _zero_initialised():
    model = _tail()
    nn.init.zeros_(model[1].weight)
    return model


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_not_found(name):
    diagnosis = fastbn.doctor(NEAR_MISSES[name]())
    assert not diagnosis.findings, diagnosis


def test_a_layer_with_an_activation_of_its_own():
    norm = moved(fastbn.BatchNorm2d(8, eps=0.0, momentum=0.0, activation="relu"))
    found = codes(fastbn.doctor(nn.Sequential(_conv(bias=True), norm), (4, 8, 4, 4)))
    assert found == {("zero-eps", "1"): 1, ("zero-momentum", "1"): 1, ("bias-before-norm", "0"): 1}


@pytest.mark.parametrize(
    "weight, var, found",
    [(1.0, 0.0, True), (4e-3, 0.0, True), (1.0, 1e-45, True), (3e-3, 0.0, False), (1.0, 2e-38, False)],
)
def test_a_channel_without_variance_matters_where_it_amplifies(weight, var, found):
    """sqrt(eps) is 0.00316, and the smallest normal float32 1.2e-38."""
    findings = fastbn.doctor(_with_running(running_var=var, weight=weight)).findings
    assert [each.code for each in findings] == ["zero-variance"] * found


@pytest.mark.parametrize(
    "shape, found",
    [
        ((1, 8, 4, 4), "small-batch"),
        ((3, 8, 1, 5), "small-batch"),
        ((2, 8, 2, 4), None),
        ((1, 8, 1, 1), "one-value-per-channel"),
        ((16, 8, 1, 1), None),
    ],
)
def test_batches(shape, found):
    training, evaluation = (
        fastbn.doctor(moved(nn.BatchNorm2d(8)).train(mode), shape).findings for mode in (True, False)
    )
    assert [each.code for each in training] == ([found] if found else []) and not evaluation


def test_a_layer_that_an_untraceable_forward_shares_is_found_by_its_calls():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            levels = []
            while x.shape[-1] >= 4:
                levels.append(self.bn(x))
                x = x[..., ::2, ::2]
            return levels

    unseen = fastbn.doctor(Pyramid())
    assert not unseen.findings
    assert unseen.left_out[0] == "order of bn: torch.fx can trace no forward that calls these"
    (found,) = fastbn.doctor(Pyramid(), (4, 8, 16, 16)).findings
    assert (found.code, found.layer) == ("shared-layer", "bn") and "3 times" in found.message


def test_a_layer_that_two_modules_call():
    shared = nn.BatchNorm2d(8)
    model = nn.Sequential(*(nn.Sequential(_conv(), shared, nn.ReLU()) for _ in range(2)))
    (found,) = fastbn.doctor(model).findings
    assert (found.code, found.layer, found.message) == ("shared-layer", "0.1", "the layer is called by 2 modules")


def test_copies_share_the_memory_of_parameters_alone():
    model = nn.Sequential(_conv(), moved(nn.BatchNorm2d(8)))
    model[0].weight.tag = "kept"
    twin = twin_of(model)
    assert twin[0].weight.tag == "kept" and twin[0].weight is not model[0].weight
    for parameter, copied in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.data_ptr() == copied.data_ptr() and parameter.requires_grad == copied.requires_grad
    for buffer, copied in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, copied) and buffer.data_ptr() != copied.data_ptr()


def test_modes_can_be_asked_for():
    model = _tail()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            moved(module)
    model.eval()
    assert not fastbn.doctor(model).findings
    assert {f.code for f in fastbn.doctor(model, (1, 8, 8, 8), training=True).findings} == {"small-batch"}
    fresh = _tail().eval()
    assert {f.code for f in fastbn.doctor(fresh).findings} == {"never-updated"}
    assert not fastbn.doctor(fresh, training=True).findings
    model[1].requires_grad_(False)
    assert codes(fastbn.doctor(model, training=True)) == {("half-frozen", "1"): 1}
    model.train()
    model[1].requires_grad_(True).eval()
    assert codes(fastbn.doctor(model)) == codes(fastbn.doctor(model, training=True)) == {("frozen-by-eval", "1"): 1}
    assert not model[1].training


def test_lazy_and_meta_models():
    lazy = nn.Sequential(nn.LazyConv2d(8, 1, bias=False), nn.LazyBatchNorm2d())
    diagnosis = fastbn.doctor(lazy)
    assert not diagnosis.findings and any("not initialised yet" in reason for reason in diagnosis.left_out)
    with torch.device("meta"):
        model = planted.Faulty()
    diagnosis = fastbn.doctor(model, planted.SHAPE, device="h200")
    found = {(f.code, f.layer) for f in diagnosis.findings}
    unreadable = "not-finite negative-variance zero-variance exploded-statistics never-updated lost-counter zero-weight"
    assert found == {(code, layer) for code, layer in planted.FINDINGS if code not in unreadable.split()}
    assert diagnosis.conversion.device == "h200" and diagnosis.conversion.traffic
    assert not fastbn.doctor(model, planted.SHAPE).conversion.traffic


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(nn.BatchNorm2d(8, eps=0.0))
    model.generator = (i for i in range(3))
    diagnosis = fastbn.doctor(model)
    assert codes(diagnosis) == {("zero-eps", "0"): 1} and diagnosis.conversion is None
    assert "cannot be copied" in diagnosis.left_out[0] and "Not checked: modes, order" in str(diagnosis)


def test_traffic_is_that_of_explain():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    (row,) = fastbn.doctor(model, (4, 3, 10, 10)).conversion.traffic
    size = 4 * 8 * 8 * 8 * 4
    assert (row.operation, row.calls, row.backend) == ("BN + relu", 1, "cpu")
    assert (row.torch_bytes, row.fastbn_bytes) == (13 * size, 8 * size)  # 5 + 8 and 3 + 5 tensors: docs/design.md
    (row,) = fastbn.doctor(model, (4, 3, 10, 10), training=False).conversion.traffic
    assert (row.torch_bytes, row.fastbn_bytes) == (4 * size, 2 * size)
    (row,) = fastbn.doctor(model, (64, 3, 10, 10), device="h200").conversion.traffic
    assert row.backend == "cuda" and row.torch_bytes == 16 * 13 * size and row.fastbn_bytes == 16 * 5 * size


def test_arguments_instead_of_a_shape():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x, index):
            return self.bn(x[index])

    arguments = torch.randn(9, 8), torch.tensor([2, 3])
    assert codes(fastbn.doctor(Two(), arguments)) == {("small-batch", "bn"): 1}
    assert not fastbn.doctor(Two().bn, torch.randn(16, 8)).findings


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ((3,), TypeError, "expected a torch.nn.Module or a state_dict, got int"),
        (({},), ValueError, "expected a state_dict with running_mean"),
        (({"bn.running_mean": torch.zeros(2)}, (1, 2)), ValueError, "expected a torch.nn.Module beside an input"),
        ((nn.BatchNorm2d(8), "1,8"), TypeError, "expected a shape, a tensor or a tuple of arguments, got str"),
        ((nn.BatchNorm2d(8), (2, -1)), ValueError, r"expected a shape of sizes of at least 0, got \[2, -1\]"),
        ((nn.Conv2d(8, 8, 1), (2, 3, 4, 4)), ValueError, "the model's forward raised RuntimeError"),
    ],
    ids=["no model", "no layers", "state_dict and input", "text", "negative", "forward"],
)
def test_misuse(arguments, error, said):
    with pytest.raises(error, match=f"doctor: .*{said}"):
        fastbn.doctor(*arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(TypeError, match="expected a torch.nn.Module in Python or a state_dict, got TorchScript"):
        fastbn.doctor(torch.jit.script(nn.BatchNorm2d(8)))


def test_an_unknown_gpu():
    with pytest.raises(ValueError, match="h200"):
        fastbn.doctor(nn.BatchNorm2d(8), device="tpu")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"a": {"b": {"c": s}}}], ids="012")
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_state_dict_is_found_wherever_it_is(wrap, prefix):
    state = nn.Sequential(nn.Conv2d(8, 8, 1), moved(nn.BatchNorm2d(8))).state_dict()
    state["1.running_var"][0] = -1
    diagnosis = fastbn.doctor(wrap({prefix + key: tensor for key, tensor in state.items()}))
    assert codes(diagnosis) == {("negative-variance", "1"): 1} and diagnosis.layers == 1


def test_two_state_dicts_in_one_checkpoint():
    state = {f"bn.{key}": tensor for key, tensor in _with_running(running_var=-1).state_dict().items()}
    assert set(codes(fastbn.doctor({"model": state, "ema": {"shadow": state}}))) == {
        ("negative-variance", "model: bn"),
        ("negative-variance", "ema.shadow: bn"),
    }


def test_the_report_as_json():
    diagnosis = fastbn.doctor(planted.Faulty(), planted.SHAPE)
    content = json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
    assert set(content) == {"subject", "layers", "findings", "left_out", "conversion"}
    assert len(content["findings"]) == len(diagnosis.findings)
    for found in content["findings"]:
        assert set(found) == {"layer", "code", "severity", "message", "why", "advice"} and found["code"] in FAULTS
    assert set(content["conversion"]) == {"device", "layers", "reasons", "traffic"}
    for row in content["conversion"]["traffic"]:
        assert set(row) == {"operation", "calls", "backend", "torch_bytes", "fastbn_bytes"}
        assert row["fastbn_bytes"] <= row["torch_bytes"]


def test_the_page_has_every_fault_with_its_severity():
    page = (ROOT / "docs" / "doctor.md").read_text()
    sections = re.findall(r"^### `([\w-]+)` \((\w+)\)$", page, re.MULTILINE)
    assert sections == [(code, fault.severity) for code, fault in FAULTS.items()]


@needs("torchvision")
@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mobilenet_v3_small", "efficientnet_b0", "densenet121", "regnet_y_400mf")
        ),
    ],
)
def test_nothing_is_found_in_torchvisions_models(name):
    import torchvision

    model = getattr(torchvision.models, name)()
    diagnosis = fastbn.doctor(model, (2, 3, 128, 128))
    assert diagnosis.layers > 20 and not diagnosis.findings, diagnosis


@needs("torchvision")
def test_the_biases_of_torchvisions_vgg_are_found():
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.vgg11_bn()
    assert {found.code for found in fastbn.doctor(model).findings} == {"bias-before-norm"}
