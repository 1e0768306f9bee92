"""The kernels through the layers above them, each path: autograd, compiled graphs, counters, layouts, errors.

The table of cases runs in tests/ops; here are small calls that every change should pass.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.backends import reference
from fastbn.ops import activations
from fastbn.testing import cases
from tests import implementations
from tests.stock import normal

PATHS = list(implementations.TRITON_LIMITS)


@pytest.fixture(params=PATHS)
def path(request):
    implementation = implementations.load(request.param)
    implementations.set_triton_limits(request.param)
    return implementation


def _step(device, backend, shape, memory_format, dtype, activation, adds, training):
    x, residual, grad_out = (normal(*shape, seed=seed).to(device, dtype) for seed in range(3))
    x, residual, grad_out = (t.contiguous(memory_format=memory_format) for t in (x, residual, grad_out))
    weight, bias = (normal(shape[1], seed=seed).to(device, dtype) + 1 for seed in (3, 4))
    buffers = torch.zeros_like(weight), torch.ones_like(weight), torch.zeros((), dtype=torch.int64, device=device)
    leaves = [t.requires_grad_() for t in ((x, residual, weight, bias) if adds else (x, weight, bias))]
    output = fastbn.functional.batch_norm(
        x,
        *buffers[:2],
        weight,
        bias,
        training,
        None,
        residual=residual if adds else None,
        activation=activation,
        num_batches_tracked=buffers[2],
        backend=backend,
    )
    return [output.detach(), *buffers, *torch.autograd.grad(output, leaves, grad_out)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation, adds", [(None, False), ("relu", True), ("silu", True), ("leaky_relu", False)])
@pytest.mark.parametrize("shape, last", [((3, 5, 4, 5), False), ((2, 8, 3, 4), True), ((9, 13), False)], ids=str)
def test_a_step_through_autograd(path, shape, last, activation, adds, training):
    memory_format = torch.channels_last if last else torch.contiguous_format
    options = (shape, memory_format, torch.float32, activation, adds, training)
    got, expected = (_step(path.device, backend, *options) for backend in ("triton", "reference"))
    for actual, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)
        assert actual.stride() == exact.stride()


@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_activation(path, dtype):
    """Statistics 0 and 1, so that z is x. Tolerances are some roundings of the type: test_ops has the tight ones."""
    x = torch.linspace(-9, 9, 96, dtype=torch.float64).to(dtype).view(2, 3, 16).to(path.device)
    stats = [torch.full((3,), value, dtype=torch.float64, device=path.device) for value in (0, 1)]
    for index, row in enumerate(activations.ROWS):
        for param in (None, -0.75) if row.default_param is not None else (None,):
            arguments = (x, None, None, None, *stats, index, row.is_piecewise_linear, param)
            got, exact = (n.normalize(*arguments) for n in (path.namespace, reference))
            torch.testing.assert_close(got[0], exact[0], msg=lambda text, row=row: f"{row.name}: {text}")
            assert torch.equal(got[1], exact[1]), row.name
            arguments = (x, x, None, None, None, None, *stats, False, index, False, False, False, True, param)
            got, exact = (n.batch_norm_backward(*arguments)[3] for n in (path.namespace, reference))
            torch.testing.assert_close(got, exact, msg=lambda text, row=row: f"{row.name}: {text}")


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_counter_and_the_averages(path, momentum):
    module, stock = (
        kind(4, momentum=momentum, affine=False).to(path.device) for kind in (fastbn.BatchNorm1d, torch.nn.BatchNorm1d)
    )
    versions = {name: buffer._version for name, buffer in module.named_buffers()}
    for seed in range(3):
        x = normal(6, 4, 3, seed=seed, dtype=torch.float32).to(path.device)
        fastbn.functional.batch_norm(
            x,
            module.running_mean,
            module.running_var,
            training=True,
            momentum=momentum,
            num_batches_tracked=module.num_batches_tracked,
            backend="triton",
        )
        stock(x)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(getattr(module, name), buffer)
        assert getattr(module, name)._version == versions[name]  # as torch leaves it


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "unaligned", "expanded"])
def test_layouts(path, layout):
    case = cases.make_case("layout", 3, 6, 5, 4, layout=layout)
    x, g = (
        cases.make_input(case, torch.float32, path.device),
        cases.make_normal(case, torch.float32, path.device, seed=2),
    )
    results = []
    for namespace in (path.namespace, reference):
        output, mean, inv_std, _ = namespace.batch_norm_train(
            x, None, None, None, None, None, None, 0.1, 1e-5, 1, False
        )
        flags = (True, True, True, False)
        grads = namespace.batch_norm_backward(g, x, None, None, None, None, mean, inv_std, True, 1, *flags)
        results.append((output, mean, inv_std, *grads))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
        assert got.stride() == exact.stride()


def test_a_step_is_the_same_bits_again(path):
    options = ((4, 6, 3, 5), torch.contiguous_format, torch.bfloat16, "relu", True, True)
    first, second = (_step(path.device, "triton", *options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_mean_far_from_zero_costs_no_digits(path):
    """Mean 1e4 and standard deviation 1e-2. float32 has ten steps in that, which are the data."""
    x = (normal(40, 6, 5) * 1e-2 + 1e4).float().to(path.device)
    output, mean, *_ = path.namespace.batch_norm_train(x, None, None, None, None, None, None, 0.1, 1e-5, 0, False)
    exact, exact_mean, *_ = reference.batch_norm_train(x.double(), *[None] * 6, 0.1, 1e-5, 0, False)
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=2 * 2**-22)  # 2 ulp of the largest, 3.5
    torch.testing.assert_close(mean, exact_mean, rtol=1e-13, atol=0)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_compiled_step_is_one_graph_with_the_ops_in_it(path, training):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x, weight, mean, var):
        return fastbn.functional.batch_norm(x, mean, var, weight, None, training, activation="relu", backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=True)
    for n in (3, 4, 7):
        arguments = [normal(n, 5, 6, dtype=torch.float32).to(path.device).requires_grad_()]
        arguments += [torch.ones(5, device=path.device, requires_grad=i == 0) for i in range(3)]
        got, expected = compiled(*arguments), layer(*arguments)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(y.square().sum(), arguments[:2]) for y in (got, expected)]
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_what_the_ops_refuse_changes_nothing(path):
    x, mean, var = torch.randn(4, 3, device=path.device), torch.zeros(3), torch.ones(3)
    counter = torch.zeros((), dtype=torch.int64, device=path.device)
    train = path.namespace.batch_norm_train
    for changed, message in (
        ({"input": x.int()}, "batch_norm_train: expected input of dtype"),
        ({"input": x[0]}, "batch_norm_train: expected input of at least 2 dimensions"),
        ({"weight": x[0, :2]}, r"batch_norm_train: expected weight of shape \[3\], got \[2\]"),
        ({"weight": x[0].half()}, "expected weight of dtype torch.float32, got torch.float16"),
        ({"residual": x[:2]}, r"expected residual of shape \[4, 3\], got \[2, 3\]"),
        ({"running_mean": x[:3, 0]}, "expected contiguous running_mean, got stride 3"),
        ({"num_batches_tracked": counter.int()}, "expected num_batches_tracked of dtype torch.int64"),
        ({"activation": 99}, "expected activation from 0 to 12, got 99"),
        ({"activation": 1, "activation_param": 0.5}, "expected no activation_param, which relu has not"),
    ):
        given = dict(input=x, residual=None, weight=None, bias=None, running_mean=mean.to(path.device))
        given |= dict(running_var=var.to(path.device), num_batches_tracked=counter, momentum=0.1, eps=1e-5)
        given |= dict(activation=0, save_mask=False) | changed
        with pytest.raises(RuntimeError, match=message):
            train(**given)
        assert not given["running_var"].ne(1).any() and counter.item() == 0


def test_every_op_refuses_to_be_differentiated(path):
    x = torch.randn(4, 3, device=path.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated directly"):
        path.namespace.batch_norm_train(x, None, None, None, None, None, None, 0.1, 1e-5, 0, False)


def test_evaluation_of_infinite_data_and_a_zero_gradient(path):
    x = torch.tensor([[-torch.inf, 1.0], [2.0, torch.nan]], device=path.device)
    ones = torch.ones(2, device=path.device)
    got = path.namespace.batch_norm_eval(x, None, ones, ones, ones * 0, ones, 1e-5, 1)
    exact = F.relu(F.batch_norm(x, ones * 0, ones, ones, ones))
    torch.testing.assert_close(got, exact, equal_nan=True)
