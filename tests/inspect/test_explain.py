"""fastbn.explain and fastbn.info: plans without a GPU, and reasons why a faster kernel cannot run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import typing

import pytest
import torch
from torch import nn

import fastbn
from fastbn import _C
from fastbn.backends import native, registry
from fastbn.inspect import explain
from fastbn.ops.activations import ACTIVATIONS

DEVICES = ("a100", "h100", "h200", "b200")


def _meta(*shape, dtype=torch.bfloat16, memory_format=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_plan_for_a_gpu_that_is_not_here(memory_format, direction, training, device):
    x = _meta(64, 256, 16, 16, memory_format=memory_format)
    plan = fastbn.explain(x, direction, training=training, device=device)
    kernel = "row_tiles" if memory_format == torch.channels_last else "channel_tiles"
    assert (plan.backend, plan.launches) == ("cuda", 1)
    if training:
        assert plan.kernel == f"stream_{kernel}"
        ring = r"a ring of [1-9] tiles, \d ahead"
        assert re.fullmatch(rf"planned for {device}; {ring}; predicted, not measured: [\d.]+ us", plan.reason)
    else:
        assert (plan.kernel, plan.reason) == (kernel, f"planned for {device}")
    assert plan.blocks > 0 and plan.threads > 0
    assert (plan.tensor_reads, plan.tensor_writes) == (2 if direction == "backward" and training else 1, 1)
    assert f"{plan.blocks} blocks of {plan.threads} threads" in str(plan)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_time_of_a_two_phase_plan_is_a_prediction_too(direction):
    plan = fastbn.explain(_meta(64, 256, 16, 16, dtype=torch.float64), direction, device="h200")
    assert (plan.kernel, plan.launches) == ("channel_tiles", 3)
    assert re.fullmatch(r"planned for h200; predicted, not measured: [\d.]+ us", plan.reason)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_frozen_statistics_take_one_launch_without_sums(memory_format, direction):
    plan = fastbn.explain(_meta(64, 256, 16, 16, memory_format=memory_format), direction, training=False, device="h200")
    assert (plan.launches, plan.tensor_reads, plan.tensor_writes) == (1, 1, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_traffic_of_a_residual_and_an_activation(direction, activation):
    """An activation alone moves no bytes; a residual does, and a mask an eighth of a byte per element."""
    x = _meta(64, 256, 16, 16)
    plans = {
        residual: fastbn.explain(x, direction, activation=activation, residual=residual, device="h200")
        for residual in (False, True)
    }
    bare = fastbn.explain(x, direction, device="h200")
    assert (plans[False].tensor_reads, plans[False].tensor_writes) == (bare.tensor_reads, bare.tensor_writes)
    mask = 1 / 16 if activation in ("relu", "leaky_relu", "relu6") else 0
    if direction == "forward":
        assert plans[True].tensor_reads == bare.tensor_reads + 1
        assert plans[True].tensor_writes == bare.tensor_writes + mask
    else:
        assert plans[True].tensor_writes == bare.tensor_writes + (activation != "none")
        assert (plans[True].tensor_reads > bare.tensor_reads) == (activation != "none")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 64, 8, 8), (8, 64, 7, 7), (8, 3, 8, 8), (8, 3, 7, 7), (2, 1, 4, 4), (2, 1, 3, 3)]
)
def test_the_planner_counts_a_mask_where_autograd_asks_for_one(shape, memory_format):
    x = _meta(*shape, memory_format=memory_format)
    plan = fastbn.explain(x, activation="relu", residual=True, device="h200")
    assert (plan.tensor_writes > 1) == native.CUDA.saves_mask(x)


def test_a_plan_is_frozen_and_made_of_plain_values():
    plan = fastbn.explain(_meta(8, 64, 7, 7), device="h200")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.backend = "cpu"
    names = ["backend", "kernel", "launches", "tensor_reads", "tensor_writes", "blocks", "threads"]
    assert [field.name for field in dataclasses.fields(plan)] == [*names, "shared_bytes", "reason", "fused"]
    assert json.loads(json.dumps(dataclasses.asdict(plan))) == dataclasses.asdict(plan)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape,kernel", [((4, 8, 5, 5), "channel_tiles"), ((16, 8), "row_tiles")], ids=str)
def test_cpu_tensors(shape, kernel, direction, training):
    plan = fastbn.explain(torch.empty(shape), direction, training=training)
    assert (plan.backend, plan.kernel, plan.blocks) == ("cpu", kernel, 0)
    assert plan.threads == torch.get_num_threads() and plan.reason == "no backend is faster for cpu tensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_of_cpu_tensors(dtype):
    """The numbers are counted by hand: backward reads grad_out, input and a mask twice, and writes two gradients."""
    x = torch.empty(4, 8, 5, 5, dtype=dtype)
    bit = 1 / (8 * x.element_size())
    for direction, training, activation, residual, expected in (
        ("forward", True, "relu", True, (3, 1 + bit)),
        ("forward", False, "silu", True, (2, 1)),
        ("forward", True, None, False, (2, 1)),
        ("backward", True, "relu", True, (2 * (2 + bit), 2)),
        ("backward", True, "silu", True, (2 * 3, 2)),
        ("backward", True, None, True, (2 * 2, 1)),
        ("backward", False, "relu", True, (1 + bit, 2)),
        ("backward", False, None, True, (1, 1)),
    ):
        plan = fastbn.explain(x, direction, activation=activation, residual=residual, training=training)
        assert (plan.tensor_reads, plan.tensor_writes) == expected, (direction, training, activation)


@pytest.mark.parametrize(
    "x,training,reason",
    [
        (torch.empty(4, 3, dtype=torch.int32), True, "no kernels for torch.int32"),
        (torch.empty(3), True, "at least two dimensions"),
        (torch.empty(3), False, "at least two dimensions"),
        (torch.empty(1, 3, 1, 1), True, "one value a channel"),
        (torch.empty(4, 0), True, "no channels"),
        (torch.empty(4, 3, device="meta"), True, "no kernels for meta tensors"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_why_not(x, training, reason, direction):
    plan = fastbn.explain(x, direction, training=training, activation="relu", residual=True)
    assert plan.backend == "torch" and reason in plan.reason and reason in str(plan)
    assert plan.tensor_reads > fastbn.explain(torch.empty(4, 3), direction, training=training).tensor_reads


def test_a_plan_that_cannot_use_whole_vectors_says_so():
    assert "element by element" in fastbn.explain(_meta(8, 64, 35, 35), device="h200").reason
    for size in (7, 8, 14):
        assert "element by element" not in fastbn.explain(_meta(8, 64, size, size), device="h200").reason


@pytest.mark.parametrize(
    "options,message",
    [
        ({"direction": "sideways"}, "direction: expected one of forward, backward, got 'sideways'"),
        ({"activation": "selu"}, "activation: expected one of none, relu, .*, got 'selu'"),
        ({"device": "p100"}, "device: expected one of a100, h100, h200, b200, got 'p100'"),
    ],
    ids=["direction", "activation", "device"],
)
@pytest.mark.parametrize("x", [torch.empty(4, 3), torch.empty(3)], ids=["supported", "unsupported"])
def test_arguments_outside(x, options, message):
    with pytest.raises(ValueError, match=message):
        fastbn.explain(x, **options)


def test_info():
    info = fastbn.info()
    assert list(info) == ["fastbn", "torch", "python", "build", "runs here", "devices"]
    assert info["fastbn"] == fastbn.__version__ and info["torch"] == torch.__version__
    assert set(info["build"]) == {
        "compiler", "against torch", "CUDA architectures", "CPU instruction sets usable here"
    }  # fmt: skip
    # And what other tests registered.
    assert list(info["runs here"])[:5] == ["cpu", "cuda", "triton", "reference", "torch"]
    assert info["runs here"]["cuda"].startswith("yes" if torch.cuda.is_available() else "no: ")
    assert json.loads(json.dumps(info)) == info


def test_the_cuda_stream_is_found_wherever_torch_has_one():
    """It is looked up by name in a library of torch's; no GPU is needed to find it."""
    built = bool(native.CUDA_ARCHITECTURES)
    assert _C.build_info()["finds_cuda_stream"] == (built and torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), "8.0;9.0;10.0+PTX", True),
        ((8, 6), "8.0;9.0;10.0+PTX", True),
        ((7, 5), "8.0;9.0;10.0+PTX", False),
        ((12, 0), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0;10.0", False),
        ((8, 0), "9.0", False),
        ((8, 0), "8.6", False),
        ((9, 0), "9.0a", True),
        ((8, 0), "8.0 9.0", True),
    ],
)
def test_gpus_that_a_build_runs_on(capability, architectures, expected):
    assert native.runs_on(capability, architectures) == expected


def test_explain_names_the_largest_shared_memory_of_the_launches():
    plan = fastbn.explain(_meta(128, 3, 1024, 1024), device="h200")
    assert plan.kernel == "channel_tiles"
    # Two totals per thread, a vote per warp, the number of elements, and four numbers for the channel.
    assert plan.shared_bytes == 2 * 256 * 8 + 8 * 4 + 8 + 32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shape_is_planned_as_the_tensor_would_be(dtype, memory_format):
    shape, options = (6, 8, 5, 7), {"activation": "relu", "residual": True}
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    for direction in ("forward", "backward"):
        given = {"dtype": dtype, "memory_format": memory_format, **options}
        assert fastbn.explain(shape, direction, **given) == fastbn.explain(x, direction, **options)
        on_gpu = fastbn.explain(torch.Size(shape), direction=direction, device="h200", **given)
        assert on_gpu == fastbn.explain(x.to("meta"), direction, device="h200", **options)
    assert on_gpu.fused == "addition and relu" and f"{on_gpu.kernel} with addition and relu" in str(on_gpu)


def test_a_shape_takes_no_memory():
    """It has 64 TB."""
    assert fastbn.explain((2**20, 2**12, 64, 64), device="cpu").backend == "cpu"


def test_a_layer_has_its_own_activation_and_mode():
    layer = fastbn.BatchNorm2d(8, activation="silu")
    x = torch.empty(4, 8, 7, 7)
    assert fastbn.explain(layer, (4, 8, 7, 7)) == fastbn.explain(x, activation="silu")
    assert fastbn.explain(layer, x.shape, residual=True).fused == "addition and silu"
    backward = fastbn.explain(layer.eval(), input_shape=[4, 8, 7, 7], direction="backward")
    assert backward == fastbn.explain(x, "backward", activation="silu", training=False)
    frozen = fastbn.FrozenBatchNorm2d(8).train()
    assert fastbn.explain(frozen, (4, 8, 7, 7)) == fastbn.explain(x, training=False)
    assert fastbn.explain(fastbn.SyncBatchNorm(8), (4, 8, 7, 7)) == fastbn.explain(x)  # there is no other process
    no_statistics = fastbn.BatchNorm2d(8, track_running_stats=False).eval()
    assert fastbn.explain(no_statistics, (4, 8, 7, 7)) == fastbn.explain(x)


def test_a_layer_of_torch_is_torchs():
    plan = fastbn.explain(nn.BatchNorm2d(8), (4, 8, 7, 7))
    assert (plan.backend, plan.reason) == ("torch", "torch's BatchNorm2d, which fastbn.convert has not replaced")
    assert plan == dataclasses.replace(fastbn.explain((4, 8, 7, 7), backend="torch"), reason=plan.reason)


@pytest.mark.parametrize(
    "layer",
    [
        fastbn.GhostBatchNorm2d(8, virtual_batch_size=2),
        fastbn.BatchRenorm2d(8),
        fastbn.MaskedBatchNorm2d(8, activation="relu"),
        fastbn.WhiteningBatchNorm2d(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_traffic_of_a_variant_is_not_counted(layer):
    plan = fastbn.explain(layer, (4, 8, 7, 7))
    assert plan.kernel == type(layer).__name__ and plan.tensor_reads != plan.tensor_reads
    assert "nan" not in str(plan) and plan.fused == (getattr(layer, "activation", None) or "")


class _Net(nn.Module):
    """A convolution, a block with an addition, a layer that is called twice, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.drop, self.shared = nn.MaxPool2d(2), nn.Dropout(0.5), nn.BatchNorm2d(8)
        self.never = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.bn(self.conv(x)) + x)
        return self.shared(self.pool(self.shared(self.drop(x))))


class _Counting(nn.Module):
    """A net in a module that keeps something in Python at each call."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = _Net(), []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.net(x)


def test_a_model_has_a_plan_for_each_call_of_a_layer():
    model = fastbn.convert(_Net())
    plans = fastbn.explain(model, (4, 3, 8, 8), memory_format=torch.channels_last)
    assert {name: plan.fused for name, plan in plans.items()} == {
        "stem.1": "relu", "bn": "addition and relu", "shared": "", "shared#2": ""
    }  # fmt: skip
    x = torch.empty(4, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    assert plans["bn"] == fastbn.explain(x, activation="relu", residual=True)
    on_gpu = fastbn.explain(model, (4, 3, 8, 8), direction="backward", device="h200")
    assert on_gpu["shared#2"] == fastbn.explain(torch.empty(4, 8, 4, 4), "backward", device="h200")
    assert fastbn.explain(nn.Linear(3, 3), (4, 3)) == {}
    assert {plan.backend for plan in fastbn.explain(_Net(), (4, 3, 8, 8)).values()} == {"torch"}


def test_a_model_that_is_explained_stays_as_it_is():
    model = fastbn.convert(_Counting())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes, random = [type(module) for module in model.modules()], torch.get_rng_state()
    attributes = [sorted(vars(module)) for module in model.modules()]
    fastbn.explain(model, (4, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes and model.calls == []
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert model.calls == [(4, 3, 8, 8)] and model.net.bn.num_batches_tracked == 1


def test_a_model_runs_where_its_parameters_are_and_in_their_dtype():
    with torch.device("meta"):
        model = fastbn.convert(_Net()).bfloat16()
    plans = fastbn.explain(model, (64, 3, 32, 32), device="h200")
    assert plans["bn"] == fastbn.explain(
        (64, 8, 32, 32), dtype=torch.bfloat16, activation="relu", residual=True, device="h200"
    )
    assert "meta" in fastbn.explain(model, (64, 3, 32, 32))["bn"].reason


@pytest.mark.needs("timm")
def test_what_fuses_into_a_layer_of_another_library_shows():
    layers = importlib.import_module("timm.layers")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.BatchNormAct2d(8), layers.BatchNormAct2d(8, apply_act=False)

        def forward(self, x):
            return torch.relu(self.last(self.first(x)) + x)

    plans = fastbn.explain(fastbn.convert(Block()), (4, 8, 5, 5))
    assert {name: plan.fused for name, plan in plans.items()} == {"first": "relu", "last": "addition and relu"}
    assert plans["last"] == fastbn.explain((4, 8, 5, 5), activation="relu", residual=True)
    unconverted = fastbn.explain(Block(), (4, 8, 5, 5))["first"]
    assert unconverted.reason == "timm's BatchNormAct2d, which fastbn.convert has not replaced"
    with torch.device("meta"):
        alone = fastbn.convert(layers.BatchNormAct2d(8))
    assert fastbn.explain(alone, (4, 8, 5, 5), device="h200").fused == "relu"


def test_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = fastbn.BatchNorm1d(3)

        def forward(self, x, y):
            return self.bn(x + y)

    assert fastbn.explain(Sum(), ((5, 3), (1, 3))) == {"bn": fastbn.explain(torch.empty(5, 3))}


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        (("x",), {}, TypeError, r"explain: expected a shape, such as .*, got 'x'"),
        (((4, 3.0),), {}, TypeError, r"explain: expected a shape, .*, got \(4, 3.0\)"),
        (((4, -3),), {}, ValueError, r"explain: expected a shape, .*, got \(4, -3\)"),
        (((4, 3),), {"device": "p100"}, ValueError, "device: expected one of a100, .* got 'p100'"),
        (((4, 3), "forward"), {"direction": "backward"}, ValueError, "expected one direction"),
        (((4, 3),), {"input_shape": (4, 3)}, ValueError, "input_shape: expected none beside a tuple"),
        ((torch.empty(4, 3),), {"dtype": torch.float32}, ValueError, "a tensor has its own"),
        ((_Net(), (4, 3, 8, 8)), {"activation": "relu"}, ValueError, "activation: expected none beside a module"),
        ((_Net(), (4, 3, 8, 8)), {"training": True}, ValueError, "training: expected none beside a module"),
        ((_Net(), (4, 3, 8, 8)), {"residual": True}, ValueError, "residual: expected False for a model"),
        ((_Net(), (4, 3, 8, 8)), {"device": "cpu"}, ValueError, "device: expected one of a100, .*, got 'cpu'"),
        ((_Net(), (4, 3, 8, 8)), {"input_shape": (4, 3, 8, 8)}, ValueError, "expected one input_shape"),
        ((_Net(),), {}, TypeError, "input_shape: expected a shape, .*, got None"),
        ((_Net(), (4, 5, 8, 8)), {}, ValueError, r"_Net cannot run on tensors of shape \(4, 5, 8, 8\)"),
        ((nn.BatchNorm2d(3), (4, 3)), {}, ValueError, "BatchNorm2d cannot run .*: ValueError: expected 4D input"),
        ((fastbn.LazyBatchNorm2d(), (4, 3, 2, 2)), {}, ValueError, "lazy layers have seen an input"),
        ((fastbn.BatchNorm2d(8), (2, 7, 4, 4)), {}, ValueError, r"expected 8 channels, got input size \[2, 7, 4, 4\]"),
        ((fastbn.FrozenBatchNorm2d(8), (2, 7, 4, 4)), {}, ValueError, "expected 8 channels, got"),
        ((fastbn.BatchNorm1d(8), (1, 8)), {}, ValueError, "expected more than 1 value per channel when training"),
        ((fastbn.BatchNorm1d(8), ((4, 8), (4, 8))), {}, ValueError, "input_shape: expected one for a layer"),
        (((2**40, 2**30),), {}, ValueError, r"expected a shape that torch has such .*, got \(1099511627776, "),
        (((2**70, 3),), {}, ValueError, "expected a shape that torch has such"),
        (
            ((2, 8, 4),),
            {"memory_format": torch.channels_last},
            ValueError,
            r"such .*, got \(2, 8, 4\): required rank 4",
        ),
        ((fastbn.BatchNorm1d(8), (2, 8, 4)), {"memory_format": torch.channels_last}, ValueError, "required rank 4"),
        (((4, 3),), {"activation": nn.SELU()}, ValueError, r"activation: expected one of none, .* got SELU\(\)"),
    ],
    ids=range(25),
)
def test_misuse_of_shapes_and_modules(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastbn.explain(*arguments, **options)


def test_the_names_for_editors_are_those_that_are_known():
    assert typing.get_args(registry.Name) == tuple(
        name for name in registry.names() if name in typing.get_args(registry.Name)
    )
    assert len(typing.get_args(registry.Name)) == 5
    assert typing.get_args(explain.GpuName) == DEVICES == explain._GPUS


def test_a_model_may_hold_tensors_that_it_has_not_registered():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.shift = fastbn.BatchNorm1d(3), torch.ones(3)

        def forward(self, x):
            return self.bn(x + self.shift)

    model = Shift()
    assert fastbn.explain(model, (5, 3)) == {"bn": fastbn.explain((5, 3))}
    assert type(model.shift) is torch.Tensor


def test_a_model_whose_shapes_depend_on_values_says_so():
    class Choose(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = fastbn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x[x.sum(1) > 0])

    with pytest.raises(ValueError, match=r"explain: Choose cannot run on tensors of shape \(5, 3\) without values: "):
        fastbn.explain(Choose(), (5, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_is_refused():
    with pytest.raises(ValueError, match="explain: expected a model that is not a ScriptModule"):
        fastbn.explain(nn.Sequential(torch.jit.script(nn.BatchNorm1d(3))), (4, 3))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, fastbn.BatchNorm1d, fastbn.WhiteningBatchNorm1d])
def test_layers_that_are_called_by_keyword(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = layer(3)

        def forward(self, x):
            return self.bn(input=x)

    assert fastbn.explain(Model(), (5, 3)).keys() == {"bn"}


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU, nn.functional.relu, "ReLU"], ids=["module", "class", "f", "name"]
)
def test_activations_as_layers_take_them(activation):
    assert fastbn.explain((5, 3), activation=activation) == fastbn.explain((5, 3), activation="relu")


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="explain: expected a model that is not compiled"):
        fastbn.explain(torch.compile(nn.Linear(3, 3)), (4, 3))
