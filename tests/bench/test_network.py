"""The networks of the benchmark: their definitions, what is measured of them, and what the gate refuses."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastbn
from bench import architectures, command, network, network_cases, network_gate, network_models, norm_share, results
from bench.network_cases import EVAL, NETWORKS, OWN_SOURCE, SMALL, TRAIN, USUAL, Network, NetworkCase
from bench.network_models import COMPILED, CONVERT, EAGER, FUSED, NAMES, TORCH, Models, Work
from bench.norm_share import Profile
from bench.runner import Runner
from fastbn.cli import main
from fastbn.measure.implementations import AGAIN
from fastbn.measure.timer import Budget
from fastbn.measure.workload import dtype_name

CPU = torch.device("cpu")
BRIEF = Budget(seconds=0, warm_up_seconds=0, min_rounds=3, max_rounds=3)
# 8 images of 32 give the last BatchNorms 8 values per channel; with two, rounding errors would be as large as values.
SHAPE = (8, 3, 32, 32)
OWN = [name for name, known in NETWORKS.items() if known.own is not None]


def marks_of(name):
    return [] if name in ("mlp", "gin") else [pytest.mark.slow]


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.fixture
def shrunk(monkeypatch, no_torchvision):
    """Leave ResNet-50 one narrow block per stage."""
    small = Network(SHAPE, SHAPE, lambda: architectures.ResNet(architectures.Bottleneck, (1, 1, 1, 1), width=8))
    monkeypatch.setitem(NETWORKS, "resnet50", small)


def mlp(dtype=torch.float32, op=TRAIN):
    return NetworkCase("mlp", NETWORKS["mlp"].small, dtype, "contiguous", op, SMALL)


def measure(case, names=EAGER, device=CPU):
    return network.measure(Models(case.network, device), case, names, BRIEF)


@pytest.mark.parametrize(
    "build, parameters, norms, last", [("resnet50", 25_557_032, 53, 2048), ("resnet18", 11_689_512, 20, 512)]
)
def test_is_resnet(build, parameters, norms, last):
    with torch.device("meta"):
        model = getattr(architectures, build)()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert list(shapes)[:2] == ["conv1.weight", "bn1.weight"] and list(shapes)[-2:] == ["fc.weight", "fc.bias"]
    assert shapes["conv1.weight"] == (64, 3, 7, 7) and shapes["fc.weight"] == (1000, last)
    assert shapes["layer2.0.downsample.1.running_var"] == (last // 4,)
    assert model.layer1[0].conv1.stride == (1, 1)
    # v1.5: the stride is in the 3x3 convolution.
    strides = [model.layer2[0].conv1.stride[0], model.layer2[0].conv2.stride[0]]
    assert strides == ([1, 2] if build == "resnet50" else [2, 1])


SCORES = {
    "resnet50": (4, 1000),
    "resnet18": (4, 1000),
    "yolo": (4, 84, 64 + 16 + 4),  # positions of 8 x 8, 4 x 4 and 2 x 2
    "unet": (4, 4, 64, 64),
    "gin": (4, 10),
    "mlp": (64, 10),
    "pointnet": (8, 40),
}


@pytest.mark.parametrize("name", OWN)
def test_shapes_of_scores(name):
    known = NETWORKS[name]
    with torch.device("meta"):
        model = known.own()
    input = network_cases.make_input(name, known.small, "contiguous", CPU)
    assert tuple(model(*(tensor.to("meta") for tensor in input)).shape) == SCORES[name]


@pytest.mark.parametrize(
    "name, statuses",
    [
        ("resnet50", {"fused": 49, "converted": 4}),
        ("resnet18", {"fused": 17, "converted": 3}),
        ("yolo", {"fused": 39}),
        ("unet", {"fused": 14}),
        ("gin", {"fused": 10}),
        ("mlp", {"fused": 4}),
        ("pointnet", {"fused": 14, "converted": 1}),
    ],
)
def test_what_convert_fuses(name, statuses):
    with torch.device("meta"):
        model = NETWORKS[name].own()
    report = fastbn.transforms.report(fastbn.convert(model))
    assert Counter(layer.status for layer in report.layers) == statuses


def test_edges_join_nodes_of_a_graph():
    nodes, edges = network_cases.make_input("gin", (100, 32), "contiguous", CPU)
    assert nodes.shape == (100, 32) and edges.shape == (2, 400)
    graphs = edges // architectures.NODES_PER_GRAPH
    assert torch.equal(graphs[0], graphs[1]) and set(graphs[0].tolist()) == set(range(4))


def test_the_suite_has_each_network_in_each_way_once():
    cases = network_cases.suite("networks", CPU)
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.network for case in cases} == set(NETWORKS)
    for name, known in NETWORKS.items():
        ways = {(case.group, case.layout, case.dtype, case.op) for case in cases if case.network == name}
        assert len(ways) == 2 * len(known.layouts) * 2 * 2
    # Cases of one network stand together, since it is built once.
    names = [case.network for case in cases]
    assert names == sorted(names, key=list(NETWORKS).index)


def test_usual_batches_are_larger_on_a_gpu():
    small, usual = (
        {case.shape for case in network_cases.suite("networks", torch.device("cuda")) if case.group == group}
        for group in (SMALL, USUAL)
    )
    assert (4, 3, 64, 64) in small and (2 * network_cases.GPU_BATCHES, 3, 224, 224) in usual


@pytest.mark.parametrize("name", ["quick", "cpu", "gpu", "visit"])
def test_other_suites_have_training_steps_of_resnet50_alone(name):
    cases = network_cases.suite(name, CPU)
    assert {(case.network, case.op) for case in cases} <= {("resnet50", TRAIN)}
    assert bool(cases) == (name != "visit")


def test_torchvision_is_the_source_where_it_is_installed(monkeypatch):
    module = types.ModuleType("torchvision")
    model = nn.Linear(2, 2)
    module.__version__, module.models = (
        "1.2.3",
        types.SimpleNamespace(
            resnet18=lambda: model,
            efficientnet_b0=lambda dropout, stochastic_depth_prob: (dropout, stochastic_depth_prob),
        ),
    )
    monkeypatch.setitem(sys.modules, "torchvision", module)
    assert network_cases.build("resnet18") == (model, "torchvision 1.2.3")
    assert network_cases.build("efficientnet_b0") == ((0.0, 0.0), "torchvision 1.2.3")
    assert network_cases.build("mlp")[1] == OWN_SOURCE
    assert not [name for name in NETWORKS if network_cases.why_absent(name)]


def test_what_is_left_out_without_torchvision(no_torchvision):
    absent = {name: network_cases.why_absent(name) for name in NETWORKS}
    left_out = {"mobilenet_v3_small", "efficientnet_b0", "densenet121"}
    assert {name for name, reason in absent.items() if reason} == left_out
    assert absent["densenet121"].startswith("densenet121 is torchvision's, and it cannot be imported: ")
    with pytest.raises(RuntimeError, match="expected torchvision for densenet121"):
        network_cases.build("densenet121")
    assert network_cases.build("resnet18")[1] == OWN_SOURCE


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("vgg", (1, 3, 32, 32)), "expected a network"),
        (("mlp", (1, 3, 32, 32)), "expected a shape of 2 sizes for mlp"),
        (("resnet50", (1, 3, 32, 32), torch.float16), "expected a dtype"),
        (("resnet50", (1, 3, 32, 32), torch.float32, "strided"), "expected a layout"),
        (("mlp", (8, 32), torch.float32, "channels_last"), "expected a layout"),
        (("mlp", (8, 32), torch.float32, "contiguous", "train"), "expected an op"),
    ],
)
def test_cases_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NetworkCase(*arguments)


def test_names_of_cases():
    case = NetworkCase("resnet50", (4, 3, 64, 64))
    assert str(case) == "resnet50-4x3x64x64-channels_last bfloat16 train_backward"
    assert str(mlp(op=EVAL)) == "mlp-64x32 float32 eval"


def test_running_statistics_are_those_of_the_batch():
    models = Models("mlp", CPU)
    norms = {name: model[1] for name, model in models.modules.items()}
    (input,) = models.prepare((64, 32), "contiguous", training=True)
    expected = models.modules[TORCH][0](input)
    for norm in norms.values():
        torch.testing.assert_close(norm.running_mean, expected.mean(0))
        torch.testing.assert_close(norm.running_var, expected.var(0))
        assert norm.momentum == 0.1 and norm.training and int(norm.num_batches_tracked) == 1
    for model in models.modules.values():
        model(input)
    assert int(norms[FUSED].num_batches_tracked) == 2
    models.prepare((64, 32), "contiguous", training=False)
    assert not norms[CONVERT].training and int(norms[FUSED].num_batches_tracked) == 1
    # Those of another shape do not hold what the first left.
    (input,) = models.prepare((100, 32), "contiguous", training=True)
    expected = models.modules[TORCH][0](input)
    torch.testing.assert_close(norms[FUSED].running_var, expected.var(0))
    assert int(norms[FUSED].num_batches_tracked) == 1
    types_of = [type(norm) for norm in norms.values()]
    assert types_of[0] is nn.BatchNorm1d and all(issubclass(cls, fastbn.BatchNorm1d) for cls in types_of[1:])


@pytest.mark.parametrize("op", [TRAIN, EVAL])
@pytest.mark.parametrize("dtype", network_cases.DTYPES, ids=str)
def test_measure(dtype, op, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    random_state = torch.random.get_rng_state()
    case = mlp(dtype, op)
    names = (*EAGER, FUSED + AGAIN)
    steps, refusals = measure(case, names)
    assert not torch.backends.cudnn.benchmark
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not refusals
    check_steps(steps, case, names)


def check_steps(steps, case, names):
    assert [step.implementation for step in steps] == list(names)
    for step in steps:
        assert (step.network, step.shape, step.group) == (case.network, case.shape, case.group)
        assert (step.dtype, step.layout, step.op) == (dtype_name(case.dtype), case.layout, case.op)
        assert step.key == (case.name, dtype_name(case.dtype), case.op, step.implementation)
        assert step.source == OWN_SOURCE
        assert 0 < step.p20_us <= step.median_us <= step.p80_us and step.rounds == 3
        assert step.norm_share is None if step.implementation in COMPILED else 0 < step.norm_share < 1
        assert step.first_loss == pytest.approx(steps[0].first_loss, rel=0.05)
        assert step.peak_bytes is None
        assert step.speedup_over.keys() == {*names} - {step.implementation}
        assert all(ratio > 0 for ratio in step.speedup_over.values())


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in OWN if name != "resnet50"])
def test_networks_pass_the_gate(name, no_torchvision):
    models, known = Models(name, CPU), NETWORKS[name]
    for layout in known.layouts:
        case = NetworkCase(name, known.small, torch.bfloat16, layout, TRAIN, SMALL)
        disagreements = network_gate.float64_disagreements(models, layout)
        losses, refusals = network_gate.gate(network_models.works(models, case, EAGER), disagreements, case, CPU)
        assert not refusals and losses.keys() == {*EAGER}


@pytest.mark.parametrize("op", [TRAIN, EVAL])
@pytest.mark.parametrize("dtype", network_cases.DTYPES, ids=str)
def test_the_mode_and_the_dtype_of_a_call(dtype, op):
    seen = []
    for work in network_models.works(Models("mlp", CPU), mlp(dtype, op), EAGER).values():
        work.model[0].register_forward_hook(lambda module, args, output: seen.append((output.dtype, module.training)))
        work.call()
        assert all(parameter.dtype == torch.float32 for parameter in work.model.parameters())
        assert all((parameter.grad is not None) == (op == TRAIN) for parameter in work.model.parameters())
    assert seen == 3 * [(dtype, op == TRAIN)]


def test_images_in_channels_last(shrunk):
    case = NetworkCase("resnet50", SHAPE, torch.bfloat16)
    works = network_models.works(Models("resnet50", CPU), case, EAGER)
    for work in works.values():
        assert work.input[0].is_contiguous(memory_format=torch.channels_last)
        assert work.model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    steps, refusals = measure(case)
    assert not refusals
    check_steps(steps, case, EAGER)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", network_cases.DTYPES, ids=str)
@pytest.mark.parametrize("op", [TRAIN, EVAL])
def test_measure_on_a_gpu(dtype, op, no_torchvision):
    case = NetworkCase("resnet50", (16, 3, 64, 64), dtype, op=op)
    steps, refusals = measure(case, NAMES, torch.device("cuda"))
    assert not refusals
    assert [step.implementation for step in steps] == list(NAMES if op == TRAIN else NAMES[:-1])
    assert all(step.peak_bytes > 0 for step in steps)


@pytest.mark.slow
def test_compiled_models(shrunk, monkeypatch):
    calls = []

    def compile(model, dynamic, options=None):
        def backend(graph_module, inputs):
            if options is not None:
                options["pre_grad_custom_pass"](graph_module.graph)
                graph_module.recompile()
            calls.append(sum(node.target is fastbn.functional.batch_norm for node in graph_module.graph.nodes))
            return aot_eager(graph_module, inputs)

        return real_compile(model, backend=backend)

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    case = NetworkCase("resnet50", SHAPE, torch.float32)
    steps, refusals = measure(case, NAMES)
    assert not refusals
    check_steps(steps, case, NAMES)
    # torch's, converted, fused, and torch's with the pass, which finds all 17 norms.
    assert (calls[0], calls[-1], len(calls)) == (0, 17, 4)
    steps, refusals = measure(NetworkCase("resnet50", SHAPE, torch.float32, op=EVAL), (*EAGER, *list(COMPILED)[-2:]))
    assert not refusals
    assert [step.implementation for step in steps] == [*EAGER, "compiled-fused"]


def plant(monkeypatch, change):
    """Make fastbn.convert change the models that it also fuses."""
    convert = fastbn.convert

    def planted(model, fuse=True):
        model = convert(model, fuse=fuse)
        if fuse:
            change(model)
        return model

    monkeypatch.setattr(network_models.fastbn, "convert", planted)


def without_an_addition(model):
    block = model.layer2[0]
    block.downsample.register_forward_hook(lambda module, args, output: torch.zeros_like(output))


@pytest.mark.parametrize("op", [TRAIN, EVAL])
def test_a_network_without_one_of_its_residuals_is_refused(shrunk, monkeypatch, op):
    plant(monkeypatch, without_an_addition)
    steps, refusals = measure(NetworkCase("resnet50", SHAPE, torch.bfloat16, op=op))
    assert [step.implementation for step in steps] == [TORCH, CONVERT]
    assert [(refusal.implementation, refusal.wrong) for refusal in refusals] == [(FUSED, True)]
    assert "in float64, the scores" in refusals[0].reason


def test_a_network_that_fails_in_float64_is_refused(monkeypatch):
    def fail(module, args):
        assert args[0].dtype != torch.float64, "no float64"

    plant(monkeypatch, lambda model: model.register_forward_pre_hook(fail))
    steps, refusals = measure(mlp())
    assert [step.implementation for step in steps] == [TORCH, CONVERT]
    assert [(refusal.wrong, refusal.reason) for refusal in refusals] == [
        (True, "in float64, AssertionError: no float64")
    ]


def test_running_statistics_that_are_off_are_refused(monkeypatch):
    plant(monkeypatch, lambda model: setattr(model[1], "momentum", 0.2))
    steps, refusals = measure(mlp())
    assert [step.implementation for step in steps] == [TORCH, CONVERT]
    assert "in float64, 1.running_mean is off torch's" in refusals[0].reason


def test_an_evaluation_that_is_off_is_refused(monkeypatch):
    def shift(module, args, output):
        return output if module.training else output + 1e-6

    plant(monkeypatch, lambda model: model.register_forward_hook(shift))
    steps, refusals = measure(mlp(op=EVAL))
    assert [step.implementation for step in steps] == [TORCH, CONVERT]
    assert "in float64, the evaluation is off torch's" in refusals[0].reason


def test_gradients_that_are_off_are_refused():
    weight = {"the gradient of weight": torch.ones(4, dtype=torch.float64)}
    expected = {**weight, "the gradient of bias": torch.full((4,), 1e-15, dtype=torch.float64)}
    cancelled = {**weight, "the gradient of bias": torch.full((4,), -1e-15, dtype=torch.float64)}
    assert network_gate.difference(cancelled, expected) is None
    off = {**expected, "the gradient of bias": torch.full((4,), 1e-10, dtype=torch.float64)}
    assert "the gradient of bias is off" in network_gate.difference(off, expected)
    off = {**expected, "the gradient of weight": weight["the gradient of weight"] * (1 + 1e-7)}
    assert "the gradient of weight is off" in network_gate.difference(off, expected)
    nan = {**expected, "the gradient of weight": weight["the gradient of weight"] * torch.nan}
    assert "the gradient of weight is off" in network_gate.difference(nan, expected)


class Checked:
    """A work whose first loss is given, or an error."""

    def __init__(self, loss):
        self.loss = loss

    def check(self):
        if isinstance(self.loss, Exception):
            raise self.loss
        return self.loss


def gate(losses, disagreements=None):
    works = {name: Checked(loss) for name, loss in losses.items()}
    return network_gate.gate(works, {name: None for name in EAGER} | (disagreements or {}), mlp(), CPU)


def test_losses_that_are_off_or_not_finite_are_refused():
    losses, refusals = gate({TORCH: 7.0, CONVERT: 7.1, FUSED: float("nan"), "compiled-fused": 7.0001})
    assert losses == {TORCH: 7.0, "compiled-fused": 7.0001}
    assert [(refusal.implementation, refusal.wrong) for refusal in refusals] == [(CONVERT, True), (FUSED, True)]
    assert refusals[0].reason == "the first loss is 7.1, torch's 7"


def test_a_compiled_model_is_refused_with_the_model_that_it_compiles():
    losses, refusals = gate({TORCH: 7.0, "compiled-fused": 7.0}, {FUSED: "off"})
    assert losses == {TORCH: 7.0}
    assert [(refusal.implementation, refusal.reason) for refusal in refusals] == [("compiled-fused", "off")]


def test_errors_are_reasons():
    losses, refusals = gate({TORCH: 7.0, CONVERT: RuntimeError("no\nluck"), FUSED: 7.0})
    assert losses == {TORCH: 7.0, FUSED: 7.0}
    assert [(refusal.wrong, refusal.reason) for refusal in refusals] == [(False, "RuntimeError: no")]
    losses, refusals = gate({TORCH: RuntimeError("no"), FUSED: 7.0})
    assert losses == {} and [refusal.implementation for refusal in refusals] == [TORCH]


def test_only_torch_is_timed_where_fastbn_has_no_kernels(monkeypatch):
    monkeypatch.setattr(network_gate, "serving", lambda device: (None, "there are none"))
    steps, refusals = measure(mlp())
    assert [step.implementation for step in steps] == [TORCH]
    assert [(refusal.wrong, refusal.reason) for refusal in refusals] == 2 * [(False, "there are none")]


def test_norm_share_does_not_count_sums_of_gradients(monkeypatch):
    profiles = {
        "forward": Profile({"aten::add_": 1, "aten::relu_": 2, "aten::native_batch_norm": 4, "aten::conv2d": 100}, 107),
        "backward": Profile(
            {"aten::add_": 100, "aten::threshold_backward": 8, "fastbn::batch_norm_backward": 16, "aten::copy_": 1}, 125
        ),
    }
    monkeypatch.setattr(norm_share, "profiled", lambda run, device: profiles[run])
    share = norm_share.norm_share(("forward", "backward"), CPU)
    assert share == pytest.approx((1 + 2 + 4 + 8 + 16) / (107 + 125))
    monkeypatch.setattr(norm_share, "profiled", lambda run, device: Profile({}, 0))
    assert norm_share.norm_share(("forward", "backward"), CPU) is None


def test_norm_ops_of_a_step(shrunk):
    case = NetworkCase("resnet50", SHAPE, torch.float32)
    counted = {}
    for name, work in network_models.works(Models("resnet50", CPU), case, EAGER).items():
        passes = [norm_share.profiled(run, CPU) for run in work.phases]
        counted[name] = [{op for op in passes[i].by_op if norm_share.is_norm_op(op, forward=i == 0)} for i in range(2)]
    assert {"aten::native_batch_norm", "aten::relu_", "aten::add_"} < counted[TORCH][0]
    assert counted[TORCH][1] == {"aten::native_batch_norm_backward", "aten::threshold_backward"}
    assert {"fastbn::batch_norm_train", "aten::relu_"} < counted[CONVERT][0]
    assert counted[FUSED] == [{"fastbn::batch_norm_train"}, {"fastbn::batch_norm_backward"}]


def test_a_step_computes_fresh_gradients():
    case = mlp()
    work = network_models.works(Models("mlp", CPU), case, (TORCH,))[TORCH]
    work.step()
    first = [parameter.grad.clone() for parameter in work.model.parameters()]
    work.step()
    assert all(torch.equal(a, b.grad) for a, b in zip(first, work.model.parameters(), strict=True))
    assert work.call == work.step and work.model.training
    evaluation = Work(copy.deepcopy(work.model).eval().requires_grad_(False), work.input, work.labels, torch.float32)
    assert evaluation.call == evaluation.evaluate and evaluation.check() > 0


ARGUMENTS = ("bench", "--suite", "networks", "--seconds", "0.001", "--device", "cpu")


def test_the_suite_writes_valid_json_and_tables(no_torchvision, tmp_path, capsys):
    import jsonschema

    path = tmp_path / "run.json"
    chosen = ("--case", "mlp,densenet121", "--dtype", "float32", "--shape", "64x32,4x3x64x64", "--layout", "contiguous")
    assert main([*ARGUMENTS, *chosen, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    jsonschema.validate(content, json.loads(results.SCHEMA.read_text()))
    assert content["complete"] and content["copy"] == [] and content["measurements"] == []
    assert {(each["op"], each["implementation"]) for each in content["networks"]} == {
        (op, name) for op in (TRAIN, EVAL) for name in EAGER
    }
    (left_out,) = content["refusals"]
    assert left_out["count"] == 2 and left_out["reason"].startswith("densenet121 is torchvision's")
    out, err = capsys.readouterr()
    assert "Left out: densenet121 is torchvision's" in err and "densenet121 is torchvision's" in out
    assert main(["bench", "--load", str(path), "--compare", str(path), "--plots", str(tmp_path / "plots")]) == 0
    again = capsys.readouterr().out
    assert "Networks, slowest first" in again and "densenet121 is torchvision's" in again
    assert "medians over the cases of networks: torch 1.000" in again and "0 regressions of 4 cases" in again
    assert "| mlp |" in (tmp_path / "plots" / "report.md").read_text()


def test_list_names_the_cases_of_networks(no_torchvision, capsys):
    assert main([*ARGUMENTS, "--case", "small", "--layout", "channels_last", "--op", "eval", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    names = [name for name in OWN if NETWORKS[name].layouts != ("contiguous",)]
    assert shown == [
        f"{name}-4x3x64x64-channels_last {dtype} eval" for name in names for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "vgg"], "--case: expected patterns that some case fits"),
        (["--case", "densenet121"], "Left out: densenet121"),
        (["--op", "train+silu", "--part", "networks"], "expected patterns that some case fits"),
        (["--implementation", "cudnn"], "expected some of torch, compile"),
        (["--implementation", "fastbn"], "expected patterns that some case fits"),
    ],
)
def test_bad_arguments(no_torchvision, capsys, arguments, message):
    assert main([*ARGUMENTS, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, names",
    [
        ((), EAGER),
        (("--implementation", "torch,compiled-f*"), (TORCH, "compiled-fused")),
        (("--implementation", "fused", "--against-itself"), (FUSED, FUSED + AGAIN)),
    ],
)
def test_on_a_cpu_models_are_compiled_only_where_asked(monkeypatch, capsys, asked, names):
    chosen, made = [], Runner.network
    monkeypatch.setattr(Runner, "network", lambda self, case, names: chosen.append(names) or made(self, case, names))
    assert main([*ARGUMENTS, "--case", "mlp", *asked, "--list"]) == 0
    assert {tuple(each) for each in chosen} == {names}


def test_on_a_gpu_usual_training_is_compiled_too():
    gpu = torch.device("cuda")
    compiled = [case for case in network_cases.suite("networks", gpu) if network_models.names_of(case, gpu) == NAMES]
    assert [case.network for case in compiled] == list(NETWORKS)
    assert {(case.group, case.dtype, case.op) for case in compiled} == {(USUAL, torch.bfloat16, TRAIN)}
    assert {case.layout for case in compiled if len(case.shape) == 4} == {"channels_last"}
    assert all(network_models.names_of(case, gpu) == NAMES for case in network_cases.suite("gpu", gpu))


@pytest.mark.slow
def test_a_wrong_network_fails_the_command(monkeypatch, capsys):
    plant(monkeypatch, lambda model: setattr(model[1], "eps", 0.1))
    assert main([*ARGUMENTS, "--case", "mlp-64x32", "--dtype", "float32"]) == 1
    assert "in float64" in capsys.readouterr().out


@pytest.mark.slow
def test_a_suspected_regression_of_a_network_is_measured_again(tmp_path, capsys, monkeypatch):
    path = tmp_path / "old.json"
    arguments = [*ARGUMENTS, "--case", "mlp-64x32", "--dtype", "float32", "--op", "eval"]
    assert main([*arguments, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    for each in content["networks"]:
        if each["implementation"] == FUSED:  # as if it had been so fast that no noise hides the difference
            for name in ("median_us", "p20_us", "p80_us"):
                each[name] /= 1000
            each["speedup_over"][TORCH] *= 1000
    path.write_text(json.dumps(content))
    measured, measure = [], network.measure
    monkeypatch.setattr(
        "bench.runner.measure", lambda models, case, *rest: measured.append(case) or measure(models, case, *rest)
    )
    new = tmp_path / "new.json"
    assert main([*arguments, "--compare", str(path), "--json", str(new)]) == 1
    assert len(json.loads(new.read_text())["networks"]) == 3
    assert "1 regressions of 2 cases" in capsys.readouterr().out
    assert len(measured) == 1 + command.CONFIRMATIONS
