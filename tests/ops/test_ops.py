"""Every implementation of the eight ops against the float64 reference, over the table of cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastbn.backends import reference
from fastbn.ops.activations import ACTIVATIONS, is_piecewise_linear
from fastbn.testing import cases, tolerance
from fastbn.testing.tolerance import assert_close_to_reference
from tests.fuzz.exact import KINKS

EPS = 1e-5


def _double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def _wide(x, per_channel):
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))


def _largest(t):
    """Return the largest finite magnitude in each channel, float64 [C]."""
    if t.numel() == 0:
        return t.new_zeros(t.shape[1])
    return t.abs().nan_to_num(0.0, 0.0, 0.0).movedim(1, 0).flatten(1).amax(1)


def _tensors(setup, device):
    """Return the operands of an op on the CPU (`host`), for the reference, and on the device."""
    case, dtype, param_dtype = setup.case, setup.dtype, setup.param_dtype
    x = cases.make_input(case, dtype)
    vector = lambda seed, low, high: cases.make_vector(case.channels, param_dtype, "cpu", seed, low, high)  # noqa: E731
    mean, var = reference.channel_stats(x)
    # Running statistics are near the data's own, or every output would be saturated.
    near = (mean + 0.1 * var.sqrt()).nan_to_num(0.5, 0.5, 0.5)
    spread = torch.where(var.isfinite() & (var > 0), var, 1.0)
    host = SimpleNamespace(
        input=x,
        residual=cases.make_normal(case, dtype, seed=1) if setup.residual else None,
        grad_out=cases.make_normal(case, dtype, seed=2),
        weight=vector(3, 0.5, 1.5) if setup.affine in ("both", "weight") else None,
        bias=vector(4, -0.5, 0.5) if setup.affine in ("both", "bias") else None,
        running_mean=near.to(param_dtype),
        running_var=(vector(5, 0.5, 1.5).double() * spread).to(param_dtype),
        num_batches_tracked=torch.tensor(2),
    )
    there = SimpleNamespace(**{k: None if v is None else v.to(device) for k, v in vars(host).items()})
    if device.type != "cpu":  # Tensor.to keeps neither gaps nor an offset
        there.input = cases.make_input(case, dtype, device)
    return host, there


def _affine(host, mean, inv_std):
    """Return z and the magnitude per channel of its terms, float64."""
    x, residual, weight, bias = _double(host.input, host.residual, host.weight, host.bias)
    xhat = (x - _wide(x, mean)) * _wide(x, inv_std)
    z, scale = xhat, _largest(xhat)
    if weight is not None:
        z, scale = z * _wide(x, weight), scale * weight.abs()
    if bias is not None:
        z, scale = z + _wide(x, bias), scale + bias.abs()
    if residual is not None:
        z, scale = z + residual, scale + _largest(residual)
    return z, scale


def _near_jump(setup, z, scale):
    """Return the elements whose branch the rounding of z decides, none where z is exact."""
    computed_in = torch.float64 if setup.dtype == torch.float64 else torch.float32
    margin = _wide(z, 4 * tolerance.forward_tolerance(computed_in, setup.case.count, scale))
    near = torch.zeros_like(z, dtype=torch.bool)
    for jump in KINKS.get(ACTIVATIONS[setup.activation], ()):
        near |= (z - jump).abs() <= margin
    return near


def _check_format(actual, host, what):
    expected = reference.suggest_memory_format(host.input)
    assert actual.dtype == host.input.dtype, what
    assert actual.is_contiguous(memory_format=expected), f"{what}: expected {expected}, got strides {actual.stride()}"


def _check_output(setup, host, output, mask, mean, inv_std, save_mask):
    z, scale = _affine(host, mean, inv_std)
    steepness = (mean * inv_std).abs().nan_to_num(0.0, 0.0, 0.0)
    at_zero = reference.activation(torch.zeros((), dtype=torch.float64), setup.activation).abs()
    allowed = _wide(z, tolerance.forward_tolerance(setup.dtype, setup.case.count, scale, steepness, at_zero))
    assert_close_to_reference(output, reference.activation(z, setup.activation), allowed, "output")
    _check_format(output, host, "output")
    assert mask.dtype == torch.uint8
    if not (save_mask and is_piecewise_linear(setup.activation)):
        assert mask.shape == (0,)
        return
    memory_format = reference.suggest_memory_format(host.input)
    expected = reference.is_upper(z, setup.activation)
    packed = reference.pack_mask(expected, memory_format)
    assert mask.shape == packed.shape
    got = reference.unpack_mask(mask.cpu(), z.shape)
    assert torch.equal(reference.pack_mask(got, memory_format), mask.cpu()), "unused bits of the mask are not 0"
    assert not ((got != expected) & ~_near_jump(setup, z, scale)).any(), "mask"


def _check_statistics(setup, host, mean, var, expected_mean, expected_var):
    """Compare float64 mean and var with the reference's. Returns their tolerances."""
    count, dtype = setup.case.count, setup.dtype
    deviation = _largest(host.input.double() - _wide(host.input, expected_mean))
    mean_allowed = tolerance.mean_tolerance(dtype, count, deviation, expected_mean.nan_to_num())
    var_allowed = tolerance.variance_tolerance(dtype, count, expected_var, expected_mean.nan_to_num())
    assert mean is None or mean.dtype == torch.float64
    if mean is not None and host.input.numel():
        assert_close_to_reference(mean, expected_mean, mean_allowed, "mean", which_nonfinite=False)
    if var is not None and host.input.numel():
        assert_close_to_reference(var, expected_var, var_allowed, "var", which_nonfinite=False)
    return mean_allowed, var_allowed


def test_train(ops, setup):
    host, there = _tensors(setup, ops.device)
    count, piecewise = setup.case.count, is_piecewise_linear(setup.activation)
    exact_mean, exact_var = reference.channel_stats(host.input)
    exact_buffers = _double(host.running_mean, host.running_var)
    exact_counter = host.num_batches_tracked.clone()
    _, _, exact_inv_std, _ = reference.batch_norm_train(
        host.input.double(), None, None, None, *exact_buffers, exact_counter, setup.momentum, EPS, 0, False
    )
    buffers = (there.running_mean, there.running_var, there.num_batches_tracked)
    arguments = (there.input, there.residual, there.weight, there.bias, *buffers, setup.momentum, EPS)
    output, mean, inv_std, mask = ops.namespace.batch_norm_train(*arguments, setup.activation, piecewise)

    assert there.num_batches_tracked.item() == 3
    mean_allowed, var_allowed = _check_statistics(setup, host, mean, None, exact_mean, exact_var)
    assert mean.shape == inv_std.shape == (setup.case.channels,) and inv_std.dtype == torch.float64
    if host.input.numel():
        allowed = tolerance.inv_std_tolerance(var_allowed, exact_inv_std)
        assert_close_to_reference(inv_std, exact_inv_std, allowed, "inv_std", which_nonfinite=False)
    factor = abs(setup.momentum) if setup.momentum is not None else 1 / 3
    bessel = count / (count - 1) if count > 1 else 1.0
    for what, buffer, exact, allowed in (
        ("running_mean", there.running_mean, exact_buffers[0], mean_allowed),
        ("running_var", there.running_var, exact_buffers[1], var_allowed * bessel),
    ):
        allowed = factor * allowed + tolerance.ulp(setup.param_dtype, exact.nan_to_num(0.0, 0.0, 0.0))
        assert_close_to_reference(buffer, exact, allowed, what, which_nonfinite=False)
    _check_output(setup, host, output, mask, exact_mean, exact_inv_std, piecewise)


def test_eval(ops, setup):
    host, there = _tensors(setup, ops.device)
    save = setup.affine == "both"
    arguments = (there.input, there.residual, there.weight, there.bias, there.running_mean, there.running_var, EPS)
    output, mean, inv_std, mask = ops.namespace.batch_norm_frozen(*arguments, setup.activation, save)
    exact_mean, exact_var = _double(host.running_mean, host.running_var)
    exact_inv_std = (exact_var + EPS).rsqrt()
    assert_close_to_reference(mean, exact_mean, 0.0, "mean")
    assert_close_to_reference(inv_std, exact_inv_std, 4 * tolerance.ulp(torch.float64, exact_inv_std), "inv_std")
    assert mean.dtype == inv_std.dtype == torch.float64
    assert torch.equal(there.running_mean.cpu(), host.running_mean)
    _check_output(setup, host, output, mask, exact_mean, exact_inv_std, save)
    evaluated = ops.namespace.batch_norm_eval(*arguments, setup.activation)
    assert torch.equal(evaluated.nan_to_num(7.0), output.nan_to_num(7.0)) and evaluated.stride() == output.stride()


def test_channel_stats_and_normalize(ops, setup):
    host, there = _tensors(setup, ops.device)
    piecewise = is_piecewise_linear(setup.activation)
    exact_mean, exact_var = reference.channel_stats(host.input)
    mean, var = ops.namespace.channel_stats(there.input)
    assert mean.shape == var.shape == (setup.case.channels,)
    _check_statistics(setup, host, mean, var, exact_mean, exact_var)
    exact_inv_std = (exact_var + EPS).rsqrt()
    given = (exact_mean.to(ops.device), exact_inv_std.to(ops.device))
    arguments = (there.input, there.residual, there.weight, there.bias, *given, setup.activation, piecewise)
    output, mask = ops.namespace.normalize(*arguments)
    _check_output(setup, host, output, mask, exact_mean, exact_inv_std, piecewise)


def _backward_case(setup, device, batch_stats):
    """Return the tensors of a backward op, the exact gradients, and their tolerances."""
    host, there = _tensors(setup, device)
    if batch_stats:
        mean, var = reference.channel_stats(host.input)
    else:
        mean, var = _double(host.running_mean, host.running_var)
    inv_std = (var + EPS).rsqrt()
    z, z_scale = _affine(host, mean, inv_std)
    host.grad_out = torch.where(_near_jump(setup, z, z_scale), 0.0, host.grad_out)
    if setup.case.layout == "transposed":  # a grad_out whose layout is not the input's
        host.grad_out = host.grad_out.contiguous()
    there.grad_out = host.grad_out.to(device)
    there.mean, there.inv_std = mean.to(device), inv_std.to(device)

    g, x, weight = _double(host.grad_out, host.input, host.weight)
    dims, count = reference.reduced_dims(x), max(setup.case.count, 1)
    grad_z = reference.activation_backward(g, z, setup.activation)
    xhat = (x - _wide(x, mean)) * _wide(x, inv_std)
    sums = grad_z.sum(dims), (grad_z * xhat).sum(dims)
    given = (*sums, count) if batch_stats else None
    exact = SimpleNamespace(grad_z=grad_z, sum_grad=sums[0], sum_grad_xhat=sums[1], count=count)
    exact.grad_input = reference.input_gradient(grad_z, xhat, weight, inv_std, given)

    dtype = setup.dtype
    largest, largest_xhat = _largest(grad_z), _largest(xhat)
    element = tolerance.activation_tolerance(dtype, _largest(g), z_scale if setup.activation else 0.0 * z_scale)
    slope = (inv_std if weight is None else inv_std * weight).abs()
    terms = tolerance.input_gradient_terms(largest, largest_xhat, batch_stats)
    grad_sum, product_sum = grad_z.abs().sum(dims), (grad_z * xhat).abs().sum(dims)
    allowed = SimpleNamespace(
        grad_z=_wide(x, element + tolerance.ulp(dtype, 1.5 * largest)),
        sum_grad=tolerance.bias_gradient_tolerance(dtype, count, grad_sum, element),
        sum_grad_xhat=tolerance.weight_gradient_tolerance(dtype, count, grad_sum, product_sum, largest_xhat, element),
    )
    computed = tolerance.input_gradient_tolerance(dtype, count, terms, slope, largest_xhat, element, batch_stats)
    allowed.grad_input = _wide(x, computed + tolerance.ulp(dtype, _largest(exact.grad_input)))
    return host, there, exact, allowed


def _residual_or_mask(setup, host, there):
    """Return the ways to tell backward what was added: the residual, or for a piecewise linear activation the mask."""
    ways = [(there.residual, None)]
    if is_piecewise_linear(setup.activation):
        z, _ = _affine(host, there.mean.cpu(), there.inv_std.cpu())
        upper = reference.is_upper(z, setup.activation)
        mask = reference.pack_mask(upper, reference.suggest_memory_format(host.input))
        ways.append((None, mask.to(there.input.device)))
    return ways


def _check_parameters(host, exact, allowed, grad_weight, grad_bias):
    for what, got, parameter, sums, off in (
        ("grad_weight", grad_weight, host.weight, exact.sum_grad_xhat, allowed.sum_grad_xhat),
        ("grad_bias", grad_bias, host.bias, exact.sum_grad, allowed.sum_grad),
    ):
        if parameter is None:
            assert got.shape == (0,), what
            continue
        assert got.dtype == parameter.dtype, what
        off = off + tolerance.ulp(parameter.dtype, sums.nan_to_num(0.0, 0.0, 0.0))
        assert_close_to_reference(got, sums, off, what)


def _check_elements(host, exact, allowed, grad_input, grad_residual):
    assert_close_to_reference(grad_input, exact.grad_input, allowed.grad_input, "grad_input")
    assert_close_to_reference(grad_residual, exact.grad_z, allowed.grad_z, "grad_residual")
    _check_format(grad_input, host, "grad_input")
    _check_format(grad_residual, host, "grad_residual")


@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_backward(ops, setup, batch_stats):
    host, there, exact, allowed = _backward_case(setup, ops.device, batch_stats)
    flags = (True, there.weight is not None, there.bias is not None, True)
    # Twice the sums and twice the count, as two ranks with the same data would pass them.
    count = torch.tensor([2 * exact.count], dtype=torch.float64)
    given = [t.to(ops.device) for t in (2 * exact.sum_grad, 2 * exact.sum_grad_xhat, count)]
    for residual, mask in _residual_or_mask(setup, host, there):
        arguments = (there.grad_out, there.input, residual, mask, there.weight, there.bias, there.mean, there.inv_std)
        grads = ops.namespace.batch_norm_backward(*arguments, batch_stats, setup.activation, *flags)
        _check_elements(host, exact, allowed, grads[0], grads[3])
        _check_parameters(host, exact, allowed, grads[1], grads[2])

        sums = ops.namespace.grad_sums(*arguments, setup.activation)
        assert sums[0].dtype == sums[1].dtype == torch.float64
        assert_close_to_reference(sums[0], exact.sum_grad, allowed.sum_grad, "sum_grad")
        assert_close_to_reference(sums[1], exact.sum_grad_xhat, allowed.sum_grad_xhat, "sum_grad_xhat")
        statistics = given if batch_stats else (None, None, None)
        _check_elements(
            host, exact, allowed, *ops.namespace.input_grad(*arguments, *statistics, setup.activation, True)
        )
