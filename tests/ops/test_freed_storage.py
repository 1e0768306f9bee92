"""Tensors whose storage was freed or cut, as FSDP does, are refused by every op and never treated as absent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.ops import contract
from tests import implementations
from tests.stock import FAST, normal

WORDS = "The tensor has a non-zero number of elements, but its data is not allocated yet."
SHAPE = (3, 4, 2)
CHANNELS = 4


def _tensors() -> dict[str, torch.Tensor]:
    """Return operands by their names in the schemas, each with an element before it that is not part of it."""
    dtypes = dict.fromkeys(("mean", "inv_std", "sum_grad", "sum_grad_xhat", "count"), torch.float64)
    dtypes["num_batches_tracked"] = torch.int64
    shapes = dict.fromkeys(("input", "residual", "grad_out"), SHAPE)
    shapes |= {"num_batches_tracked": (), "count": (1,)}
    names = (*shapes, "weight", "bias", "running_mean", "running_var", "mean", "inv_std", "sum_grad", "sum_grad_xhat")
    tensors = {}
    for name in names:
        shape = torch.Size(shapes.get(name, (CHANNELS,)))
        memory = torch.ones(shape.numel() + 1, dtype=dtypes.get(name, torch.float32))
        tensors[name] = memory[1:].view(shape)
    stats = tensors["mean"], tensors["inv_std"]
    _, tensors["mask"] = torch.ops.fastbn.normalize(tensors["input"], None, None, None, *stats, 1, True)
    return tensors


OTHERS = {"momentum": 0.1, "eps": 1e-5, "activation": 1, "activation_param": None}


def _arguments(op: torch._ops.OpOverload, tensors: dict) -> dict:
    return {a.name: {**OTHERS, **tensors}.get(a.name, True) for a in op._schema.arguments}


def _operands():
    for name in contract.OPS:
        op = getattr(torch.ops.fastbn, name).default
        for argument in op._schema.arguments:
            if "Tensor" in str(argument.type):
                yield name, argument.name


@pytest.mark.parametrize("cut", ["freed", "cut"])
@pytest.mark.parametrize("name,operand", list(_operands()))
@pytest.mark.parametrize("ops", implementations.params("cpu", "emulator", "cuda", "triton"), indirect=True)
def test_ops(ops, name, operand, cut):
    tensors = {key: tensor.to(ops.device) for key, tensor in _tensors().items()}
    if operand == "residual":
        tensors["mask"] = None  # backward would not look at the residual
    op = getattr(ops.namespace, name)
    op(**_arguments(op.default, tensors))
    others = {key: t.clone() for key, t in tensors.items() if t is not None and key != operand}
    storage = tensors[operand].untyped_storage()
    storage.resize_(0 if cut == "freed" else storage.nbytes() - 1)
    with pytest.raises(RuntimeError, match=f"{name}: expected {operand} with a storage of at least .*{WORDS}"):
        op(**_arguments(op.default, tensors))
    for key, before in others.items():
        assert torch.equal(tensors[key], before), key


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
@pytest.mark.parametrize("size", [0, 8])
def test_input_that_is_not_dense(layout, size):
    x = torch.ones(3, 2, 4).transpose(1, 2) if layout == "transposed" else torch.ones(3, 1, 2).expand(SHAPE)
    assert not x.is_contiguous()
    x.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match=WORDS):
        fastbn.functional.batch_norm(x, None, None, training=True)


def test_an_empty_tensor_needs_no_storage():
    x = torch.ones(0, 4, 2)
    x.untyped_storage().resize_(0)
    assert fastbn.functional.batch_norm(x, torch.zeros(4), torch.ones(4)).shape == (0, 4, 2)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["input", "running_mean", "running_var", "weight", "bias"])
def test_the_layer_raises_what_torch_raises(name, training):
    names = ("input", "running_mean", "running_var", "weight", "bias")
    errors = []
    for function in (F.batch_norm, fastbn.functional.batch_norm):
        given = {key: torch.ones(SHAPE if key == "input" else CHANNELS) for key in names}
        given[name].untyped_storage().resize_(0)
        with pytest.raises(Exception) as caught:
            function(**given, training=training)
        errors.append(caught.value)
    # Torch itself has moved the running statistics by then.
    assert all(torch.equal(t, torch.ones_like(t)) for key, t in given.items() if key != name)
    assert type(errors[1]) is type(errors[0])
    assert WORDS in str(errors[0]) and WORDS in str(errors[1])


@pytest.mark.parametrize("name", ["input", "weight", "grad_out"])
def test_backward(name):
    """The layer's parameters were freed after forward and not restored."""
    fast = FAST[2](5)
    x = normal(3, 5, 4, 6, dtype=torch.float32).requires_grad_()
    output = fast(x)
    grad_out = torch.ones_like(output)
    {"input": x, "weight": fast.weight, "grad_out": grad_out}[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"batch_norm_backward: expected {name} with a storage.*{WORDS}"):
        output.backward(grad_out)
