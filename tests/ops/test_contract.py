"""The contract beyond values near the reference's: edges, NaN, inf, extreme data, repeatability, for every
implementation.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastbn.backends import reference
from fastbn.ops.activations import ACTIVATIONS, is_piecewise_linear
from fastbn.testing import cases

EPS = 1e-5


def test_setups_cover_every_activation_dtype_memory_format_and_residual():
    for table in (cases.ORDINARY, cases.SMALL_DENSE):
        setups = cases.setups(table)
        options = (range(len(ACTIVATIONS)), cases.DTYPES, ("contiguous", "channels_last"), (False, True))
        assert {(s.activation, s.dtype, s.case.memory_format, s.residual) for s in setups} == set(
            itertools.product(*options)
        )
        assert {(s.case, s.dtype) for s in setups} == set(itertools.product(table, cases.DTYPES))
        assert len({str(s) for s in setups}) == len(setups)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_only_what_is_asked_for_is_returned(ops, flags, batch_stats):
    x, r, g = (torch.randn(3, 5, 7, device=ops.device) for _ in range(3))
    w, mean, inv_std = torch.ones(5, device=ops.device), *torch.ones(2, 5, dtype=torch.float64, device=ops.device)
    grads = ops.namespace.batch_norm_backward(g, x, r, None, w, w, mean, inv_std, batch_stats, 1, *flags)
    full = reference.batch_norm_backward(
        *(t.cpu() for t in (g, x, r)), None, *(t.cpu() for t in (w, w, mean, inv_std)), batch_stats, 1, *[True] * 4
    )
    for grad, expected, asked in zip(grads, full, flags, strict=True):
        assert grad.dtype == expected.dtype
        if asked:
            # Wide on purpose: test_ops checks the values; a gradient of another channel is off by order 1.
            torch.testing.assert_close(grad.cpu(), expected, rtol=1e-4, atol=1e-4)
        else:
            assert grad.shape == (0,)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("value", cases.CONSTANTS)
def test_a_constant_channel_gives_exactly_its_bias(ops, value, channels_last, dtype):
    value = min(value, 0.9 * torch.finfo(dtype).max)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.full((7, 3, 5, 11), value, dtype=dtype, device=ops.device).contiguous(memory_format=memory_format)
    bias = torch.tensor([0.1, -2.0, 0.0], dtype=dtype, device=ops.device)
    weight = torch.tensor([1.3, 1.0, -7.7], dtype=dtype, device=ops.device)
    output, mean, _, _ = ops.namespace.batch_norm_train(x, None, weight, bias, None, None, None, 0.1, EPS, 0, False)
    assert torch.equal(mean, x[0, :, 0, 0].double())
    assert torch.equal(output, bias.view(1, 3, 1, 1).expand_as(x))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "relu6", "elu", "hardswish", "hardsigmoid"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_branches_at_the_boundaries_are_torchs(ops, name, dtype):
    """Frozen statistics 0 and 1 and a zero bias make z equal to the input."""
    index = ACTIVATIONS.index(name)
    row = [-7.0, -3.0, -0.0, 0.0, 1.0, 3.0, 6.0, float("inf"), float("nan")]
    z = torch.tensor([row] * 3, dtype=dtype)
    mean, inv_std = torch.zeros(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    expected = reference.activation_backward(torch.full_like(z.double(), 2.0), z.double(), index).to(dtype)
    x, m, s = z.to(ops.device), mean.to(ops.device), inv_std.to(ops.device)
    grad_out = torch.full_like(x, 2.0)
    grads = ops.namespace.batch_norm_backward(
        grad_out, x, None, None, None, None, m, s, False, index, False, False, False, True
    )
    torch.testing.assert_close(grads[3].cpu(), expected, equal_nan=True)
    if is_piecewise_linear(index):
        mask = ops.namespace.normalize(x, None, None, None, m, s, index, True)[1]
        assert torch.equal(mask.cpu(), reference.pack_mask(reference.is_upper(z, index), torch.contiguous_format))


# grad_z / grad_out where z is NaN, in torch's vectorised CPU kernels.
AT_NAN = dict.fromkeys(ACTIVATIONS, float("nan")) | {
    "none": 1.0,
    "relu": 1.0,
    "leaky_relu": 0.01,
    "relu6": 0.0,
    "hardsigmoid": 0.0,
}


@pytest.mark.parametrize("source", ["input", "residual"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_nan_has_the_derivative_of_torchs_vectors(ops, name, dtype, source):
    """Statistics are frozen, and backward takes the derivative from z itself and from the mask.

    Channels are large enough that, with batch statistics, the CPU would not recompute the derivative of relu.
    """
    for shape in ((72, 9), (2, 9, 40), (72, 16), (2, 16, 40)):
        _check_derivatives_at_nan(ops, ACTIVATIONS.index(name), dtype, source, shape)


def _check_derivatives_at_nan(ops, index, dtype, source, shape):
    """Check NaNs of either sign under weights of either sign."""
    channels = shape[1]
    generator = torch.Generator().manual_seed(0)
    nan = torch.rand(shape, generator=generator) < 0.3
    negative = torch.rand(shape, generator=generator) < 0.5
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("input", "residual")}
    values[source][nan] = float("nan")
    bits = values[source].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    bits[nan & negative] ^= torch.iinfo(bits.dtype).min  # arithmetic may lose the sign of a NaN
    x, residual = (t.to(ops.device) for t in values.values())
    weight = torch.where(torch.arange(channels) % 2 == 0, 1.5, -1.5).to(ops.device, dtype)
    bias = torch.zeros_like(weight)
    mean, inv_std = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    mean, inv_std = mean.to(ops.device), inv_std.to(ops.device)
    grad_out = torch.full_like(x, 2.0)
    options = (weight, bias, mean, inv_std, False, index, True, False, False, True)
    results = []
    if source == "input":
        results.append(ops.namespace.batch_norm_backward(grad_out, x, None, None, *options))
    results.append(ops.namespace.batch_norm_backward(grad_out, x, residual, None, *options))
    if is_piecewise_linear(index):
        mask = ops.namespace.normalize(x, residual, weight, bias, mean, inv_std, index, True)[1]
        results.append(ops.namespace.batch_norm_backward(grad_out, x, None, mask, *options))
    expected = torch.full((int(nan.sum()),), 2 * AT_NAN[ACTIVATIONS[index]]).to(dtype)
    for grad_input, _, _, grad_residual in results:
        assert not grad_residual.cpu()[~nan].isnan().any()
        # bfloat16 rounds by up to 2^-8 of a value; another branch gives NaN, 0, all or a hundredth of it.
        torch.testing.assert_close(grad_residual.cpu()[nan], expected, equal_nan=True, rtol=1e-2, atol=0)
        scaled = grad_residual.cpu() * weight.cpu().view(-1, *[1] * (len(shape) - 2))
        torch.testing.assert_close(grad_input.cpu()[nan], scaled[nan], equal_nan=True, rtol=1e-2, atol=0)


def test_a_zero_derivative_stops_an_infinite_gradient(ops):
    x = torch.tensor([[-1.0, 1.0]], device=ops.device)
    stats = [torch.tensor([value] * 2, dtype=torch.float64, device=ops.device) for value in (0, 1)]
    grad_out = torch.full_like(x, float("inf"))
    grads = ops.namespace.batch_norm_backward(
        grad_out, x, None, None, None, None, *stats, False, 1, True, False, False, True
    )
    assert grads[3].tolist() == [[0.0, float("inf")]]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 64, 7, 7),
        (2, 65, 7, 7),
        pytest.param((3, 7, 16, 32), marks=pytest.mark.slow),
        (2, 130, 1, 2),
        pytest.param((1, 41, 28, 28), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_channel_is_left_out(ops, shape, channels_last):
    """Channels are handled in groups: there are full groups, with a remainder and without."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias = (torch.arange(shape[1]) % 5 + 1.0 for _ in range(2))
    results = []
    for namespace, device in ((ops.namespace, ops.device), (reference, torch.device("cpu"))):
        x_, g_, w, b = (t.to(device) for t in (x, g, weight, bias))
        output, mean, inv_std, _ = namespace.batch_norm_train(x_, None, w, b, None, None, None, 0.1, EPS, 0, False)
        grads = namespace.batch_norm_backward(g_, x_, None, None, w, b, mean, inv_std, True, 0, *[True] * 3, False)
        evaluated = namespace.batch_norm_eval(x_, None, w, b, b, w, EPS, 0)
        results.append([t.cpu() for t in (output, mean, inv_std, *grads[:3], evaluated)])
    # Wide on purpose: test_ops checks the values.
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_inputs_are_left_alone(ops):
    tensors = [torch.randn(3, 4, 5, 6, device=ops.device) for _ in range(3)]
    weight, bias = torch.randn(2, 4, device=ops.device)
    before = [t.clone() for t in (*tensors, weight, bias)]
    x, r, g = tensors
    y, mean, inv_std, mask = ops.namespace.batch_norm_train(x, r, weight, bias, None, None, None, 0.1, EPS, 1, True)
    ops.namespace.batch_norm_backward(g, x, None, mask, weight, bias, mean, inv_std, True, 1, True, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, weight, bias), before, strict=True))
    assert y.data_ptr() != x.data_ptr()


def test_statistics_of_eval_survive_an_update_of_the_buffers(ops):
    running_mean = torch.zeros(3, dtype=torch.float64, device=ops.device)
    running_var = torch.ones(3, dtype=torch.float64, device=ops.device)
    x = torch.randn(4, 3, dtype=torch.float64, device=ops.device)
    _, mean, _, _ = ops.namespace.batch_norm_frozen(x, None, None, None, running_mean, running_var, EPS, 0, False)
    running_mean.fill_(7)
    assert torch.equal(mean, torch.zeros_like(mean))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_is_counted_and_nothing_else(ops, momentum):
    mean, var = torch.zeros(4, device=ops.device), torch.ones(4, device=ops.device)
    tracked = torch.tensor(2, device=ops.device)
    x = torch.empty(0, 4, 3, 3, device=ops.device)
    output = ops.namespace.batch_norm_train(x, None, None, None, mean, var, tracked, momentum, EPS, 0, False)[0]
    assert output.shape == x.shape and tracked.item() == 3
    assert torch.equal(mean, torch.zeros_like(mean)) and torch.equal(var, torch.ones_like(var))


def test_momentum_none_without_a_counter_changes_nothing(ops):
    mean, var = torch.full((4,), 0.25, device=ops.device), torch.full((4,), 1.5, device=ops.device)
    x = torch.randn(5, 4, device=ops.device)
    ops.namespace.batch_norm_train(x, None, None, None, mean, var, None, None, EPS, 0, False)
    assert torch.equal(mean, torch.full_like(mean, 0.25)) and torch.equal(var, torch.full_like(var, 1.5))


def test_a_residual_of_another_layout(ops):
    x = torch.randn(3, 4, 5, 6, device=ops.device)
    r = torch.randn(3, 4, 5, 6, device=ops.device).contiguous(memory_format=torch.channels_last)
    same = ops.namespace.batch_norm_train(x, r.contiguous(), None, None, None, None, None, 0.1, EPS, 1, True)
    other = ops.namespace.batch_norm_train(x, r, None, None, None, None, None, 0.1, EPS, 1, True)
    assert all(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_repeated_calls_are_bitwise_equal(ops):
    x, g = torch.randn(2, 16, 8, 5, 7, device=ops.device)
    forward = [
        ops.namespace.batch_norm_train(x, None, None, None, None, None, None, 0.1, EPS, 6, False) for _ in range(2)
    ]
    _, mean, inv_std, _ = forward[0]
    arguments = (g, x, None, None, None, None, mean, inv_std, True, 6, True, True, True, True)
    backward = [ops.namespace.batch_norm_backward(*arguments) for _ in range(2)]
    for first, second in (forward, backward):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outlier", [1e4, -1e4])
def test_outliers_at_the_ends_do_not_spoil_the_variance(ops, outlier, dtype, channels_last):
    """Padding makes such data: sums about an outlier cancel. The tolerance is 64 units for the terms of a sum."""
    x = torch.randn(6, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype) + 5
    x[0, :, 0, 0] = x[-1, :, -1, -1] = outlier
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _, expected = reference.channel_stats(x.double())
    _, var = ops.namespace.channel_stats(x.to(ops.device))
    torch.testing.assert_close(var.cpu(), expected, rtol=64 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_that_overflow_float32(ops, dtype, channels_last):
    """They overflow in one channel of eight. The tolerance is 64 units for the terms of a sum."""
    x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 1e25
    x = x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _, expected = reference.channel_stats(x.double())
    _, var = ops.namespace.channel_stats(x.to(ops.device))
    unfused = [None, None, None, None, None, None, 0.1, EPS, 0, False]
    _, _, inv_std, _ = ops.namespace.batch_norm_train(x.to(ops.device), *unfused)
    for actual, exact in ((var, expected), (inv_std, (expected + EPS).rsqrt())):
        torch.testing.assert_close(actual.cpu(), exact, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_are_rounded_to_even(ops, dtype):
    """1 + eps/2 rounds down and 1 + 3/2 eps up, in vectors and in their tails."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([1, 1 + eps], dtype=dtype).repeat(3, 8, 21)
    half = torch.full_like(x, eps / 2)
    zeros, ones = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    expected = torch.tensor([1, 1 + 2 * eps], dtype=dtype).repeat(3, 8, 21)
    arguments = (t.to(ops.device) for t in (x, half))
    output = ops.namespace.normalize(*arguments, None, None, zeros.to(ops.device), ones.to(ops.device), 0, False)[0]
    assert torch.equal(output.cpu(), expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_channel_of_inf_has_an_infinite_mean(ops, dtype, channels_last):
    """inf must not become the pivot: all differences from it would be NaN."""
    x = torch.randn(4, 8, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, 2], x[:, 4], x[1:, 5] = torch.inf, -torch.inf, torch.inf
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mean, var = ops.namespace.channel_stats(x.to(ops.device))
    assert mean[[2, 4, 5]].tolist() == [torch.inf, -torch.inf, torch.inf]
    assert var.isnan().nonzero().flatten().tolist() == [2, 4, 5]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pivot_far_off_costs_no_digits(ops, dtype, channels_last):
    """The five samples of the pivot are the outliers, so that nearly all of the squares cancel.

    Summed in float32 about them, the variance is off by 5e-6 to 1e-5.
    """
    x = torch.randn(16, 8, 25, 40, generator=torch.Generator().manual_seed(0)) * 0.01
    for i in (1, 3, 5, 7, 9):  # tenths of the images and of the pixels of one, and of all pixels in channels_last
        x[16 * i // 10].flatten(1)[:, 1000 * i // 10] = 30
        image, pixel = divmod(16 * 1000 * i // 10, 1000)
        x[image].flatten(1)[:, pixel] = 30
    x = x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    exact, _ = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, var = ops.namespace.channel_stats(x.to(ops.device))
    unfused = [None, None, None, None, None, None, 0.1, 0.0, 0, False]
    _, _, inv_std, _ = ops.namespace.batch_norm_train(x.to(ops.device), *unfused)
    torch.testing.assert_close(var.cpu(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(inv_std.cpu(), exact.rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_gradients_are_about_the_mean_before_it_was_rounded(ops, dtype, channels_last):
    """grad_out is 1 everywhere, so that its sum shows the rounding of a mean that is many standard deviations large.

    8 units of the sum of |xhat| are allowed; the error of a rounded mean is 50 units and more.
    """
    x = (2000 + torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mean, var = reference.channel_stats(x)
    inv_std = (var + EPS).rsqrt()
    mean = mean + 1e-4 * torch.arange(1, 9)
    arguments = (torch.ones_like(x), x, None, None, None, None, mean, inv_std, 0)
    exact = reference.grad_sums(*arguments)[1]
    scale = reference.channel_stats(((x.double() - mean.view(1, -1, 1, 1)) * inv_std.view(1, -1, 1, 1)).abs())[0]
    actual = ops.namespace.grad_sums(*(t.to(ops.device) if isinstance(t, torch.Tensor) else t for t in arguments))[1]
    assert ((actual.cpu() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * scale * 1024).all()


def test_statistics_are_the_same_bits_with_and_without_a_mask(ops):
    # On a GPU, runs of three channels are not a multiple of 8, for which fastbn.functional asks for no mask.
    channels = 3 if ops.name in ("reference", "cpu") else 8
    x = torch.randn(64, channels, 17, 17, device=ops.device).contiguous(memory_format=torch.channels_last)
    results = [
        ops.namespace.batch_norm_train(x, x, None, None, None, None, None, 0.1, EPS, 1, save_mask)
        for save_mask in (False, True)
    ]
    for without, with_mask in list(zip(*results, strict=True))[:3]:
        assert torch.equal(without, with_mask)
