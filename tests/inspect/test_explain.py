"""fastbn.explain and fastbn.info: plans without a GPU, and reasons why a faster kernel cannot run."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

import fastbn
from fastbn import _C
from fastbn.backends import native
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
    assert [field.name for field in dataclasses.fields(plan)] == [*names, "shared_bytes", "reason"]
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
