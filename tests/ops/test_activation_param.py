"""The parameter of leaky_relu and elu: the ops against the reference, and the public surface against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.backends import reference
from fastbn.ops import activations
from fastbn.ops.activations import ACTIVATIONS, ROWS, is_piecewise_linear
from fastbn.testing import cases, tolerance
from fastbn.testing.tolerance import assert_close_to_reference

PARAMS = (("leaky_relu", 0.2), ("leaky_relu", -0.75), ("leaky_relu", 0.0), ("elu", 0.5), ("elu", -2.0), ("elu", 0.0))
EPS = 1e-5


@pytest.fixture(params=PARAMS, ids=lambda param: "{}-{:g}".format(*param))
def activation(request):
    return request.param


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_ops_compute_with_the_parameter(ops, activation, dtype, channels_last):
    """Statistics 0 and 1, so that z is x plus the residual."""
    name, param = activation
    index = ACTIVATIONS.index(name)
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, grad_out = (
        torch.randn(3, 8, 5, 8, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    zeros, ones = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    z = x.double() + residual.double()
    scale = max(abs(param), 1)
    grad_out = torch.where(z.abs() < 1e-3, 0.0, grad_out)  # where rounding of z may take the other branch
    x_, residual_, grad_out_, zeros_, ones_ = (t.to(ops.device) for t in (x, residual, grad_out, zeros, ones))
    exact = reference.activation(z, index, param)
    allowed = tolerance.forward_tolerance(dtype, 1, scale * z.abs().max())
    masked = is_piecewise_linear(index)

    output, mask = ops.namespace.normalize(x_, residual_, None, None, zeros_, ones_, index, masked, param)
    assert_close_to_reference(output, exact, allowed, "normalize")
    running = (zeros_.to(dtype), ones_.to(dtype))
    evaluated = ops.namespace.batch_norm_eval(x_, residual_, None, None, *running, 1e-30, index, param)
    assert_close_to_reference(evaluated, exact, allowed, "eval")
    frozen = ops.namespace.batch_norm_frozen(x_, residual_, None, None, *running, 1e-30, index, masked, param)
    assert torch.equal(frozen[0], evaluated)
    trained = ops.namespace.batch_norm_train(x_, residual_, *[None] * 5, 0.1, EPS, index, masked, param)[0]
    expected = reference.batch_norm_train(x.double(), residual.double(), *[None] * 5, 0.1, EPS, index, False, param)[0]
    assert_close_to_reference(trained, expected, tolerance.forward_tolerance(dtype, 120, 8 * scale), "train")

    grad_z = reference.activation_backward(grad_out.double(), z, index, param)
    allowed = tolerance.activation_tolerance(dtype, scale * grad_out.double().abs().max(), z.abs().max())
    allowed = allowed + tolerance.ulp(dtype, grad_z.abs().max())
    for r, m in [(residual_, None), (None, mask)] if masked else [(residual_, None)]:
        given = (grad_out_, x_, r, m, None, None, zeros_, ones_)
        grads = ops.namespace.batch_norm_backward(*given, False, index, True, False, False, True, param)
        assert_close_to_reference(grads[0], grad_z, allowed, "frozen grad_input")
        assert_close_to_reference(grads[3], grad_z, allowed, "grad_residual")
        made = ops.namespace.input_grad(*given, None, None, None, index, True, param)
        assert torch.equal(made[0], grads[0]) and torch.equal(made[1], grads[3])
        sum_grad = ops.namespace.grad_sums(*given, index, param)[0]
        off = tolerance.sum_tolerance(dtype, 120, grad_z.abs().sum((0, 2, 3))) + 120 * allowed
        assert_close_to_reference(sum_grad, grad_z.sum((0, 2, 3)), off, "sum_grad")


def test_none_is_torchs_default(ops):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(ops.device)
    for index, row in enumerate(ROWS):
        outputs = [
            ops.namespace.batch_norm_train(x, *[None] * 6, 0.1, EPS, index, False, *param)[0]
            for param in ((), (None,), (row.default_param,))
        ]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_ops_refuse_a_parameter_where_there_is_none(ops):
    x = torch.randn(2, 3, device=ops.device)
    with pytest.raises((RuntimeError, ValueError), match="relu"):
        ops.namespace.batch_norm_train(x, *[None] * 6, 0.1, EPS, 1, False, 0.5)


def _operands(dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 4), (3, 2, 4), (2,), (2,))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_(requires_grad) for t in values]


def _stock(x, residual, weight, bias, activation, training, buffers=(None, None)):
    name, param = activation
    z = F.batch_norm(x, *buffers, weight, bias, training)
    return getattr(F, name)(z if residual is None else z + residual, param)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_first_and_second_derivatives_are_torchs(activation, training, with_residual):
    name, param = activation
    results = []
    for uses_fastbn in (True, False):
        x, residual, weight, bias = _operands()
        residual = residual if with_residual else None
        buffers = (torch.full((2,), 0.1).double(), torch.full((2,), 1.3).double())
        if uses_fastbn:
            options = dict(training=training, residual=residual, activation=name, activation_param=param)
            y = fastbn.functional.batch_norm(x, *buffers, weight, bias, **options)
        else:
            y = _stock(x, residual, weight, bias, activation, training, buffers)
        leaves = [t for t in (x, residual, weight, bias) if t is not None]
        grad_out = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).requires_grad_()
        first = torch.autograd.grad(y, leaves, grad_out, create_graph=True)
        once = torch.autograd.grad(y, leaves, grad_out.detach(), retain_graph=True)
        leaves.append(grad_out)
        second = torch.autograd.grad(sum(t.sin().sum() for t in first), leaves, allow_unused=True)
        second = [torch.zeros_like(leaf) if t is None else t for leaf, t in zip(leaves, second, strict=True)]
        results.append((y, *first, *once, *second))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_call_left_to_torch_has_the_parameter(activation):
    name, param = activation
    x = _operands(requires_grad=False)[0]

    def fast(x, **options):
        return fastbn.functional.batch_norm(
            x, None, None, training=True, activation=name, activation_param=param, **options
        )

    def stock(x):
        return _stock(x, None, None, None, activation, True)

    for backend in ("torch", "reference", "cpu"):
        torch.testing.assert_close(fast(x, backend=backend), stock(x))
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    torch.testing.assert_close(torch.func.jvp(fast, (x,), (tangent,)), torch.func.jvp(stock, (x,), (tangent,)))


def test_a_compiled_module_has_the_parameter():
    torch.manual_seed(0)
    module = fastbn.BatchNorm2d(4, activation="leaky_relu", activation_param=0.2)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    expected = F.leaky_relu(F.batch_norm(x, None, None, module.weight, module.bias, True), 0.2)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [fastbn.FrozenBatchNorm1d, fastbn.BatchRenorm1d, fastbn.BatchNorm1d])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "add"])
def test_variants_have_the_parameter(activation, kind, with_residual):
    """r and d of BatchRenorm are 1 and 0 where they are clipped to that."""
    name, param = activation
    results = []
    for fused in (True, False):
        x, residual, _, _ = _operands()
        bounds = {"r_max": 1.0, "d_max": 0.0} if kind is fastbn.BatchRenorm1d else {}
        options = dict(activation=name, activation_param=param) if fused else {}
        module = kind(2, **bounds, **options, dtype=torch.float64)
        y = module(x, residual) if with_residual else module(x)
        y = y if fused else getattr(F, name)(y, param)
        if not fused and with_residual:  # the activation comes after the residual
            y = getattr(F, name)(module(x) + residual, param)
        first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        results.append((y, first, torch.autograd.grad(first.sin().sum(), x)[0]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_module_shows_its_parameter_and_reverts_without():
    module = fastbn.BatchNorm1d(3, activation="elu", activation_param=2)
    assert "activation='elu', activation_param=2" in repr(module)
    assert "activation" not in repr(fastbn.BatchNorm1d(3))
    module.activation = None
    assert "activation_param" not in vars(fastbn.revert(module))


@pytest.mark.parametrize(
    ("activation", "param", "message"),
    [
        ("relu", 0.1, "activation_param: expected None, since relu has no parameter, got 0.1"),
        (None, 1.0, "activation_param: expected None, since none has no parameter, got 1.0"),
        ("elu", "1", "activation_param: expected a number or None, got '1'"),
        ("leaky_relu", True, "activation_param: expected a number or None, got True"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(activation, param, message):
    x = torch.randn(4, 3)
    options = dict(activation=activation, activation_param=param)
    for call in (
        lambda: fastbn.functional.batch_norm(x, None, None, training=True, **options),
        lambda: fastbn.BatchNorm1d(3, **options),
        lambda: fastbn.explain(x, **options),
        lambda: activations.check_param(activations.index(activation), param),
    ):
        with pytest.raises(ValueError, match=message):
            call()
