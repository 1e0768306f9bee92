"""save="output": the gradients of a call whose backward reads its output, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.autograd.from_output import MAX_SHIFT, MIN_WEIGHT
from fastbn.ops.activations import ACTIVATIONS
from tests import implementations
from tests.stock import normal

SHAPES = {
    "contiguous": ((4, 6, 5, 4), torch.contiguous_format),
    "channels_last": ((2, 16, 4, 4), torch.channels_last),
    "channels_last_3d": ((2, 8, 2, 2, 2), torch.channels_last_3d),
    "(N, C)": ((9, 11), torch.contiguous_format),
}
# Name, parameter, whether a residual is added first.
OUTPUT = [("none", None, False), ("leaky_relu", None, False), ("leaky_relu", 0.3, False), ("leaky_relu", 2.0, False)]
BOTH = [("relu", None, True), ("leaky_relu", 0.2, True)]
# In units of the largest number of a gradient; float64 beside the reference, the others beside save="input".
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


def _vectors(channels, dtype, affine):
    if not affine:
        return None, None
    weight = torch.linspace(0.25, 2, channels).double()
    weight[::2] *= -1
    bias = weight.abs() * torch.linspace(-1, 1, channels)
    return (t.to(dtype).requires_grad_() for t in (weight, bias))


def _gradients(save, shape, memory_format, dtype, activation, param, adds, training, affine=True, backend=None):
    x, r, grad_out = (normal(*shape, seed=s, dtype=dtype).contiguous(memory_format=memory_format) for s in range(3))
    weight, bias = _vectors(shape[1], dtype if dtype == torch.float64 else torch.float32, affine)
    mean, var = torch.full((2, shape[1]), 0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = {"input": x.requires_grad_()}
    if adds:
        leaves["residual"] = r.requires_grad_()
    if affine:
        leaves |= {"weight": weight, "bias": bias}
    output = fastbn.functional.batch_norm(
        x, mean, var, weight, bias, training, residual=r if adds else None, activation=activation,
        activation_param=param, save=save, backend=backend,
    )  # fmt: skip
    assert ("FromOutput" in type(output.grad_fn).__name__) == (save == "output")
    grads = torch.autograd.grad(output, list(leaves.values()), grad_out)
    return dict(zip(leaves, grads, strict=True))


def _assert_close(actual, expected, dtype):
    for name, grad in expected.items():
        assert actual[name].dtype == grad.dtype and actual[name].stride() == grad.stride(), name
        error = (actual[name] - grad).abs().max() / grad.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


IMPLEMENTATIONS = ("reference", "cpu", "emulator", "stream", "triton")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation, param, adds", OUTPUT + BOTH)
@pytest.mark.parametrize("shape, memory_format", SHAPES.values(), ids=SHAPES)
def test_gradients(shape, memory_format, activation, param, adds, dtype, training):
    case = shape, memory_format, dtype, activation, param, adds, training
    _assert_close(_gradients("output", *case), _gradients("input", *case), dtype)


@pytest.mark.parametrize("activation, param, adds", OUTPUT + BOTH)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ops", implementations.params(*IMPLEMENTATIONS), indirect=True)
def test_backends(ops, memory_format, activation, param, adds):
    backend = implementations.backend_name(ops.name)
    case = (4, 16, 8, 8), memory_format, torch.float32, activation, param, adds, True
    _assert_close(_gradients("output", *case, backend=backend), _gradients("input", *case), torch.float32)


@pytest.mark.parametrize("activation, param, adds", OUTPUT + BOTH)
def test_without_weight_and_bias(activation, param, adds):
    case = (4, 6, 5, 4), torch.contiguous_format, torch.float64, activation, param, adds, True, False
    _assert_close(_gradients("output", *case), _gradients("input", *case), torch.float64)


@pytest.mark.parametrize("has", ["weight", "bias"])
def test_one_vector(has):
    x, grad_out = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    results = []
    for save in ("input", "output"):
        leaves = x.clone().requires_grad_(), torch.tensor([0.5, -1.0, 2.0]).double().requires_grad_()
        output = fastbn.functional.batch_norm(leaves[0], None, None, training=True, save=save, **{has: leaves[1]})
        results.append(torch.autograd.grad(output, leaves, grad_out))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0.0, MAX_SHIFT])
def test_accuracy_is_that_of_an_input_with_such_a_mean(shift, dtype):
    """With a bias of `shift` weights, gradients differ from float64's as those of save="input" do for an input whose
    mean is `shift` standard deviations from 0. Over 20 inputs; one in one differs by chance.
    """
    weight = torch.tensor([0.5, 1.0, -1.0, 2.0]).double()

    def gradients(x, save, bias, grad_out):
        of_parameters = torch.promote_types(x.dtype, torch.float32)
        leaves = x.clone().requires_grad_(), weight.to(of_parameters, copy=True).requires_grad_()
        y = fastbn.functional.batch_norm(leaves[0], None, None, leaves[1], bias.to(of_parameters), True, save=save)
        return [g.double() for g in torch.autograd.grad(y, leaves, grad_out.to(x.dtype))]

    squares = torch.zeros(2, 2)
    for seed in range(20):
        x, grad_out = normal(64, 4, 16, seed=seed), normal(64, 4, 16, seed=100 + seed)
        expected = gradients(x, "input", torch.zeros(4), grad_out)
        for row, actual in enumerate(
            (
                gradients(x.to(dtype), "output", shift * weight.abs(), grad_out),
                gradients((x + shift).to(dtype), "input", torch.zeros(4), grad_out),
            )
        ):
            squares[row] += torch.stack([(a - e).square().sum() for a, e in zip(actual, expected, strict=True)])
    from_output, from_input = squares.sqrt()
    assert (from_output <= 1.5 * from_input).all(), squares


def test_a_weight_of_zero_loses_its_own_gradient_only():
    weight = torch.tensor([0.0, MIN_WEIGHT / 2, 1.0])
    x, grad_out = normal(8, 3, 7, dtype=torch.float32), normal(8, 3, 7, seed=1, dtype=torch.float32)
    results = []
    for save in ("input", "output"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_(), torch.zeros(3).requires_grad_()
        output = fastbn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True, save=save)
        results.append(torch.autograd.grad(output, leaves, grad_out))
    (input, of_weight, of_bias), actual = results
    torch.testing.assert_close(actual[0][:, 2], input[:, 2])
    scale = (weight[1] / 1.0) * grad_out.abs().max()
    assert (actual[0] - input)[:, :2].abs().max() <= 2 * scale and actual[0].isfinite().all()
    torch.testing.assert_close(actual[1][2], of_weight[2])
    assert actual[1].isfinite().all()
    torch.testing.assert_close(actual[2], of_bias)


def _kept(run):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = run()
    return output, kept


@pytest.mark.parametrize("adds", [False, True], ids=["no_residual", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_kept(activation, adds):
    x, r = normal(4, 16, 5, 5).requires_grad_(), normal(4, 16, 5, 5, seed=1).requires_grad_()

    def run(save):
        return _kept(
            lambda: fastbn.functional.batch_norm(
                x, None, None, training=True, residual=r if adds else None, activation=activation, save=save
            )
        )

    output, kept = run("output")
    pointers = {t.data_ptr() for t in kept}
    has_output, has_input = output.data_ptr() in pointers, x.data_ptr() in pointers
    assert has_output == ((activation, None, adds) in [(a, None, b) for a, _, b in OUTPUT + BOTH])
    assert has_input == (not has_output or adds)
    assert not (has_output and any(t.dtype == torch.uint8 for t in kept))
    if not has_output:
        assert [t.shape for t in kept] == [t.shape for t in run("input")[1]]


def test_frozen_statistics_keep_nothing_that_is_not_needed():
    x, r = normal(4, 3, 5).requires_grad_(), normal(4, 3, 5, seed=1).requires_grad_()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    output, kept = _kept(
        lambda: fastbn.functional.batch_norm(x, mean, var, residual=r, activation="relu", save="output")
    )
    large = [t for t in kept if t.numel() > 3]
    assert [t.data_ptr() for t in large] == [output.data_ptr()]
    output.sum().backward()
    torch.testing.assert_close(r.grad, (output > 0).double())


def test_hooks_that_change_strides():
    case = (2, 16, 4, 4), torch.channels_last, torch.float64, "leaky_relu", 0.2
    for adds in (False, True):
        expected = _gradients("output", *case, adds, True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
            actual = _gradients("output", *case, adds, True)
        for name, grad in expected.items():
            torch.testing.assert_close(actual[name], grad)


def test_errors():
    x = normal(4, 3, 5).requires_grad_()
    with pytest.raises(ValueError, match='save: expected "input" or "output", got \'both\''):
        fastbn.functional.batch_norm(x, None, None, training=True, save="both")
    y = fastbn.functional.batch_norm(x, None, None, training=True, save="output")
    with pytest.raises(RuntimeError, match="expected save='input' where backward is differentiated"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
    y = fastbn.functional.batch_norm(x, None, None, training=True, save="output")
    loss = F.relu(y, inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors_are_those_of_a_call_that_keeps_the_input():
    x = normal(4, 3, 5)
    with torch.inference_mode():
        weight = torch.ones(3).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for save in ("input", "output"):
        with pytest.raises(RuntimeError, match="[Ii]nference tensors"):
            fastbn.functional.batch_norm(x.requires_grad_(), mean, var, weight, training=True, save=save)
        assert not mean.any()


def test_transforms_and_no_grad_do_not_mind():
    x = normal(4, 3, 5)
    expected = F.batch_norm(x, None, None, training=True)

    def call(x):
        return fastbn.functional.batch_norm(x, None, None, training=True, save="output")

    torch.testing.assert_close(call(x), expected)
    torch.testing.assert_close(torch.func.vmap(call)(x[None])[0], expected)
    gradient = torch.func.grad(lambda x: (call(x) ** 3).sum())(x)
    leaf = x.clone().requires_grad_()
    (F.batch_norm(leaf, None, None, training=True) ** 3).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
