"""The names of operations, and the spread of a ratio."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastbn.measure import gate, implementations, operations, timer
from fastbn.measure.inputs import make_inputs
from fastbn.measure.workload import Workload
from fastbn.testing.cases import make_case


@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=str)
def test_a_name_is_parsed_to_its_operation(operation):
    assert operations.parse(str(operation)) == operation


@pytest.mark.parametrize(
    "name", ["", "step", "train+", "train+relu+add", "train+add+add", "train+relu6", "relu", "train+add+relu+silu"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected one of train, train_backward, eval, frozen, then perhaps"):
        operations.parse(name)


def test_the_spread_of_a_speedup_is_that_of_the_ratios():
    ours, theirs = [1.0, 2.0, 4.0, 1.0, 1.0], [2.0, 2.0, 16.0, 3.0, 0.5]  # ratios 2, 1, 4, 3, 0.5
    median, p20, p80 = timer.speedup_and_spread(ours, theirs)
    assert (median, p20, p80) == (2.0, pytest.approx(0.9), pytest.approx(3.2))
    assert timer.speedup(ours, theirs) == median


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", operations.ACTIVATIONS)
def test_the_gate_passes_every_operation_that_has_a_name(activation, dtype):
    case = make_case("shape", 8, 5, 6, 7, layout="channels_last")
    inputs = make_inputs(case, dtype, torch.device("cpu"))
    rivals = [each for each in implementations.implementations(torch.device("cpu")) if each.name in ("torch", "fastbn")]
    for mode in operations.MODES:
        for name in (f"{mode}+{activation}", f"{mode}+add+{activation}"):
            admitted = list(gate.admit(rivals, Workload("one", case, dtype, operations.parse(name)), inputs))
            assert [each.reason for each in admitted] == ["", ""], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["train", "train_backward", "train_backward+add+relu"])
@pytest.mark.parametrize("shape", [(2, 64), (3, 64), (2, 256, 1, 1), (1, 1, 1, 2), (4, 2048)], ids=str)
def test_the_gate_passes_channels_of_few_values(shape, operation, dtype):
    """Their gradients of the input cancel nearly to 0."""
    assert _why_refused(shape, operation, dtype) == {"torch": "", "fastbn": ""}


@pytest.mark.parametrize("shape", [(3, 64), (4, 2048)], ids=str)
def test_the_gate_still_refuses_wrong_gradients_of_such_channels(shape):
    inputs = make_inputs(make_case("shape", *shape), torch.float32, torch.device("cpu"))
    operation = operations.parse("train_backward")
    (torchs,) = [each for each in implementations.implementations(torch.device("cpu")) if each.name == "torch"]
    right = torchs.prepare(operation, inputs)

    def call():
        output, grad_input, *rest = right.call()
        return output, grad_input + 1e-4 * inputs.grad_out, *rest

    wrong = gate.why_wrong(dataclasses.replace(right, call=call), inputs, gate.expect(operation, inputs))
    assert wrong and wrong.startswith("grad_input: got ")


def _why_refused(shape, operation, dtype):
    case = make_case("shape", *shape)
    workload = Workload("shape", case, dtype, operations.parse(operation))
    inputs = make_inputs(case, dtype, torch.device("cpu"))
    rivals = [each for each in implementations.implementations(torch.device("cpu")) if each.name in ("torch", "fastbn")]
    return {each.name: each.reason for each in gate.admit(rivals, workload, inputs)}
