"""The float64 reference against torch itself. Everything else is measured against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastbn import _C
from fastbn.autograd import composite
from fastbn.backends import reference
from fastbn.ops import activations
from fastbn.ops.activations import ACTIVATIONS
from fastbn.testing import cases

FINITE = [c for c in cases.SMALL if c.data in ("normal", "offset") and c.numel and c.count > 1]
EPS = 1e-5
INDICES = range(len(ACTIVATIONS))
BOUNDARY = (-math.inf, -3.0, -1.0, -0.0, 0.0, 0.5, 3.0, 6.0, 20.0, 21.0, math.inf, math.nan)


def _torch_activation(z, index):
    name = ACTIVATIONS[index]
    if name == "hardsigmoid":  # torch takes 1/6 in float32 for its derivative, in float64 too
        return F.relu6(z + 3) / 6
    return z if name == "none" else getattr(F, name)(z)


def _tensors(case, seed=0):
    x = cases.make_input(case, torch.float64, seed=seed)
    residual, grad_out = (cases.make_normal(case, torch.float64, seed=s) for s in (1, 2))
    weight = cases.make_vector(case.channels, torch.float64, "cpu", 3, 0.5, 1.5)
    bias = cases.make_vector(case.channels, torch.float64, "cpu", 4, -0.5, 0.5)
    return x, residual, weight, bias, grad_out


@pytest.mark.parametrize("case", FINITE, ids=str)
@pytest.mark.parametrize("momentum", [0.1, -0.5, 0.0])
def test_training_forward_and_buffers_are_torchs(case, momentum):
    x, _, weight, bias, _ = _tensors(case)
    buffers = [cases.make_vector(case.channels, torch.float64, "cpu", s, 0.5, 1.5) for s in (5, 6)]
    expected_buffers = [b.clone() for b in buffers]
    expected = F.batch_norm(x, *expected_buffers, weight, bias, True, momentum, EPS)
    tracked = torch.tensor(41)
    output, mean, inv_std, mask = reference.batch_norm_train(
        x, None, weight, bias, *buffers, tracked, momentum, EPS, 0, True
    )
    # torch's own float64 error at |mean| = 1e6 std; for other data it is rounding.
    tolerance = dict(rtol=1e-6, atol=1e-6) if case.data == "offset" else dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output, expected, **tolerance)
    torch.testing.assert_close(buffers, expected_buffers, **tolerance)
    assert tracked.item() == 42 and mask.shape == (0,)
    assert output.is_contiguous(memory_format=reference.suggest_memory_format(x))


@pytest.mark.parametrize("activation", INDICES, ids=ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["prime-7x13", "prime-3x7x11x13-channels_last", "prime-5x11x17", "wide-2x129x3x3"])
def test_gradients_are_autograds(name, training, residual, activation):
    case = next(c for c in cases.ORDINARY if c.name == name)
    x, r, weight, bias, grad_out = _tensors(case)
    r = r if residual else None
    running = [cases.make_vector(case.channels, torch.float64, "cpu", s, 0.5, 1.5) for s in (5, 6)]
    leaves = [t.requires_grad_() for t in (x, weight, bias, r) if t is not None]
    z = F.batch_norm(x, *[t.clone() for t in running], weight, bias, training, 0.1, EPS)
    output = _torch_activation(z if r is None else z + r, activation)
    expected = torch.autograd.grad(output, leaves, grad_out)
    with torch.no_grad():
        if training:
            got = reference.batch_norm_train(x, r, weight, bias, None, None, None, 0.1, EPS, activation, True)
        else:
            got = reference.batch_norm_frozen(x, r, weight, bias, *running, EPS, activation, True)
        y, mean, inv_std, mask = got
        torch.testing.assert_close(y, output.detach(), rtol=1e-10, atol=1e-10)
        masks = [None, mask] if activations.is_piecewise_linear(activation) else [None]
        for m in masks:
            r_ = r if m is None else None
            flags = (True, True, True, True)
            got = reference.batch_norm_backward(
                grad_out, x, r_, m, weight, bias, mean, inv_std, training, activation, *flags
            )
            torch.testing.assert_close(list(got[: len(leaves)]), list(expected), rtol=1e-9, atol=1e-9)
            statistics = {} if training else {"mean": mean, "inv_std": inv_std}
            got = composite.backward_formula(grad_out, x, r_, m, weight, bias, activation, **statistics, eps=EPS)
            torch.testing.assert_close(list(got[: len(leaves)]), list(expected), rtol=1e-9, atol=1e-9)
            sums = reference.grad_sums(grad_out, x, r_, m, weight, bias, mean, inv_std, activation)
            torch.testing.assert_close(list(sums), [expected[2], expected[1]], rtol=1e-9, atol=1e-9)
            count = torch.tensor([case.count], dtype=torch.float64)
            given = (*sums, count) if training else (None, None, None)
            got = reference.input_grad(grad_out, x, r_, m, weight, bias, mean, inv_std, *given, activation, True)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-9)


def test_momentum_none_is_the_average_over_batches():
    torch.manual_seed(0)
    mean, var, tracked = torch.zeros(4), torch.ones(4), torch.tensor(0)
    stock = torch.nn.BatchNorm1d(4, momentum=None).double()
    for _ in range(5):
        x = torch.randn(6, 4, dtype=torch.float64)
        stock(x)
        reference.batch_norm_train(x, None, None, None, mean, var, tracked, None, EPS, 0, False)
    torch.testing.assert_close(mean.double(), stock.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), stock.running_var, rtol=1e-6, atol=1e-6)
    assert tracked.item() == 5


def test_momentum_none_without_a_counter_changes_nothing():
    mean = torch.full((4,), 0.25)
    reference.batch_norm_train(torch.randn(3, 4), None, None, None, mean, None, None, None, EPS, 0, False)
    assert torch.equal(mean, torch.full((4,), 0.25))


def test_an_empty_batch_is_counted_and_nothing_else():
    mean, var, tracked = torch.zeros(4), torch.ones(4), torch.tensor(2)
    output = reference.batch_norm_train(torch.empty(0, 4), None, None, None, mean, var, tracked, 0.1, EPS, 1, True)[0]
    assert output.shape == (0, 4) and tracked.item() == 3
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))


def test_one_value_per_channel_has_no_unbiased_variance():
    mean, var = torch.zeros(2), torch.ones(2)
    x = torch.tensor([[1.0, 2.0]])
    output = reference.batch_norm_train(x, None, None, None, mean, var, None, 0.5, EPS, 0, False)[0]
    assert torch.equal(output, torch.zeros(1, 2))
    assert torch.equal(mean, torch.tensor([0.5, 1.0])) and var.isnan().all()


@pytest.mark.parametrize("value", cases.CONSTANTS)
def test_a_constant_channel_gives_exactly_its_bias(value):
    x = torch.full((7, 3, 11), value, dtype=torch.float64)
    bias = torch.tensor([0.1, -2.0, 0.0], dtype=torch.float64)
    output = reference.batch_norm_train(x, None, None, bias, None, None, None, 0.1, EPS, 0, False)[0]
    assert torch.equal(output, bias.view(1, 3, 1).expand_as(x))


def _normalize(x, eps=EPS):
    return reference.batch_norm_train(x, None, None, None, None, None, None, 0.1, eps, 0, False)[0]


def test_worked_example_of_two_dimensions():
    x = torch.tensor([[1, 3, 2, 4], [2, 2, 1, 1], [6, 2, 4, 1]], dtype=torch.float64)
    expected = [
        [-0.9258, 1.4142, -0.2673, 1.4142],
        [-0.4629, -0.7071, -1.0690, -0.7071],
        [1.3887, -0.7071, 1.3363, -0.7071],
    ]
    torch.testing.assert_close(_normalize(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)


def test_worked_example_of_three_dimensions():
    x = torch.tensor([[[1, 3], [2, 4]], [[2, 2], [1, 1]], [[6, 2], [4, 1]]], dtype=torch.float64)
    expected = [
        [[-1.0426, 0.2085], [-0.1240, 1.3644]],
        [[-0.4170, -0.4170], [-0.8682, -0.8682]],
        [[2.0851, -0.4170], [1.3644, -0.8682]],
    ]
    torch.testing.assert_close(_normalize(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)


def test_worked_example_of_images():
    images = [
        [[[3, 4], [1, 2]], [[3, 3], [1, 2]], [[4, 1], [4, 1]]],
        [[[2, 2], [1, 4]], [[3, 3], [1, 4]], [[2, 1], [2, 3]]],
        [[[4, 2], [4, 1]], [[1, 1], [2, 1]], [[3, 2], [2, 4]]],
    ]
    first = [
        [[0.4201, 1.2602], [-1.2602, -0.4201]],
        [[0.8835, 0.8835], [-1.0442, -0.0803]],
        [[1.4201, -1.2706], [1.4201, -1.2706]],
    ]
    last = [
        [[1.2602, -0.4201], [1.2602, -1.2602]],
        [[-1.0442, -1.0442], [-0.0803, -1.0442]],
        [[0.5232, -0.3737], [-0.3737, 1.4201]],
    ]
    output = _normalize(torch.tensor(images, dtype=torch.float64))
    for got, expected in ((output[0], first), (output[2], last)):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)


def test_volumes_against_numpy():
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 4, 4))
    axes = (0, 2, 3, 4)
    expected = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
    np.testing.assert_allclose(_normalize(torch.from_numpy(x), eps=0.0).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", INDICES, ids=ACTIVATIONS)
def test_derivatives_at_the_boundaries_are_torchs(index):
    # Full vectors only: at NaN torch's scalar relu6, elu and hardswish, which compute the ends of tensors, differ.
    for value in BOUNDARY:
        z = torch.full((64,), value, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(_torch_activation(z, index).sum(), z)
        got = reference.activation_grad(z.detach(), index)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15, equal_nan=True, msg=lambda m: f"{value}: {m}")
        assert got.isnan().equal(expected.isnan())


def test_nan_takes_the_upper_branch_of_relu_alone():
    nan = torch.tensor([math.nan])
    branches = {ACTIVATIONS[i]: reference.is_upper(nan, i).item() for i in (1, 2, 3)}
    assert branches == {"relu": True, "leaky_relu": False, "relu6": False}


@pytest.mark.parametrize("index", INDICES, ids=ACTIVATIONS)
def test_second_derivatives_of_activations(index):
    z = torch.linspace(-7.1, 7.3, 50, dtype=torch.float64).requires_grad_()
    g = torch.linspace(-1, 2, 50, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, z: reference.activation_backward(g, z, index), (g, z))


@pytest.mark.parametrize("name", ["elu", "silu", "gelu", "mish", "softplus", "sigmoid", "tanh"])
def test_second_derivative_at_0_is_torchs(name):
    index, seconds = ACTIVATIONS.index(name), []
    for derivative in (
        lambda z: reference.activation_grad(z, index),
        lambda z: torch.autograd.grad(_torch_activation(z, index).sum(), z, create_graph=True)[0],
    ):
        z = torch.tensor([-0.0, 0.0], dtype=torch.float64, requires_grad=True)
        seconds.append(torch.autograd.grad(derivative(z).sum(), z)[0])
    torch.testing.assert_close(*seconds)


def test_second_derivative_of_elu_does_not_overflow():
    z = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
    (second,) = torch.autograd.grad(reference.activation_grad(z, ACTIVATIONS.index("elu")).sum(), z)
    assert second.item() == 0


@pytest.mark.parametrize("activation", INDICES, ids=ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_formula_is_twice_differentiable(training, residual, activation):
    case = cases.Case("tiny", (2, 2, 3))
    x, r, weight, bias, grad_out = _tensors(case, seed=7)
    running = (torch.tensor([0.1, -0.2]).double(), torch.tensor([1.1, 0.8]).double())
    statistics = {} if training else {"mean": running[0], "inv_std": running[1]}

    def forward(x, weight, bias, grad_out, *r):
        return composite.backward_formula(
            grad_out, x, r[0] if r else None, None, weight, bias, activation, **statistics, eps=EPS
        )

    inputs = [t.requires_grad_() for t in (x, weight, bias, grad_out, *([r] if residual else []))]
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


@pytest.mark.parametrize("activation", [1, 2, 3], ids=ACTIVATIONS[1:4])
def test_backward_formula_takes_a_mask_for_the_residual(activation):
    case = cases.Case("tiny", (3, 5, 2, 4), "channels_last")
    x, r, weight, bias, grad_out = _tensors(case)
    mask = reference.batch_norm_train(x, r, weight, bias, None, None, None, 0.1, EPS, activation, True)[3]
    got = composite.backward_formula(grad_out, x, None, mask, weight, bias, activation, eps=EPS)
    expected = composite.backward_formula(grad_out, x, r, None, weight, bias, activation, eps=EPS)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_result_dtypes(dtype):
    x, params = torch.randn(4, 3, 2, dtype=dtype), torch.ones(3)
    params = params if dtype != torch.float64 else params.double()
    y, mean, inv_std, mask = reference.batch_norm_train(x, x, params, params, None, None, None, 0.1, EPS, 1, True)
    assert (y.dtype, mean.dtype, inv_std.dtype, mask.dtype) == (dtype, torch.float64, torch.float64, torch.uint8)
    flags = (True, True, True, True)
    grads = reference.batch_norm_backward(y, x, x, None, params, params, mean, inv_std, True, 1, *flags)
    assert [g.dtype for g in grads] == [dtype, params.dtype, params.dtype, dtype]
    formula = composite.backward_formula(y, x, x, None, params, params, 1, eps=EPS, dtype=torch.float32)
    assert [g.dtype for g in formula] == [dtype, params.dtype, params.dtype, dtype]


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_masks_unpack_to_what_was_packed(case):
    upper = cases.make_normal(case, torch.float32) > 0
    memory_format = reference.suggest_memory_format(cases.make_input(case, torch.float32))
    mask = reference.pack_mask(upper, memory_format)
    assert mask.dtype == torch.uint8
    assert torch.equal(reference.unpack_mask(mask, case.shape), upper)


def test_bits_of_a_mask_lie_as_the_contract_says():
    upper = torch.zeros(2, 3, 1, 11, dtype=torch.bool)
    upper[1, 2, 0, 9] = upper[1, 2, 0, 0] = upper[0, 1, 0, 3] = True
    mask = reference.pack_mask(upper, torch.contiguous_format)
    assert (
        mask.shape == (2, 3, 2) and mask[1, 2].tolist() == [1, 2] and mask[0, 1].tolist() == [8, 0] and mask.sum() == 11
    )
    mask = reference.pack_mask(upper, torch.channels_last)
    assert mask.shape == (22, 1) and mask[20].item() == 4 and mask[11].item() == 4 and mask[3].item() == 2


def test_memory_format_is_torchs():
    for case in cases.SMALL:
        x = cases.make_input(case, torch.float32)
        output = torch.batch_norm(x, None, None, None, None, True, 0.1, EPS, False)
        assert output.is_contiguous(memory_format=reference.suggest_memory_format(x)), case


def test_unknown_activation():
    assert activations.index(None) == 0 and activations.index("hardswish") == 7
    message = "activation: expected one of none, relu, .*, got 'selu'"
    with pytest.raises(ValueError, match=message):
        activations.index("selu")


def test_a_build_with_other_activations_is_refused():
    built = _C.activations()
    activations.check_build(built)
    swapped = [built[0], built[2], built[1], *built[3:]]
    other_mask = [*built[:-1], built[-1] | {"is_piecewise_linear": True}]
    for other in (built[:-1], swapped, other_mask, [*built, {"name": "new", "is_piecewise_linear": False}]):
        with pytest.raises(ImportError, match="expected the activations"):
            activations.check_build(other)


def test_a_row_has_one_way_to_its_derivative():
    with pytest.raises(TypeError, match="expected one of backward and is_upper"):
        activations.Activation("identity", forward=lambda z: z)
