"""fastbn.WhiteningBatchNorm1d and 2d: what whitening promises, its running statistics, and what surrounds a layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastbn
from fastbn.autograd.whitening import METHODS, Whitening
from tests.stock import assert_same, normal, step
from tests.whitening import correlated, definition

CHANNELS = 4
WHITENING = {1: fastbn.WhiteningBatchNorm1d, 2: fastbn.WhiteningBatchNorm2d}
STOCK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
SHAPES = {1: (9, CHANNELS), 2: (3, CHANNELS, 4, 6)}
STATE = ["weight", "bias", "running_mean", "running_cov", "num_batches_tracked"]


def _layer(dim: int = 2, dtype: torch.dtype = torch.float64, seed: int = 11, **options):
    """Return a layer none of whose tensors has its initial value."""
    layer = WHITENING[dim](CHANNELS, dtype=dtype, **options)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(1 + 0.3 * normal(CHANNELS, seed=seed + number))
        layer(correlated(50, CHANNELS, *[2] * (2 * dim - 2), seed=seed, dtype=dtype))
    return layer


def _covariance(y: torch.Tensor) -> torch.Tensor:
    rows = y.detach().double().transpose(0, 1).reshape(y.shape[1], -1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows @ rows.mT / rows.shape[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("method", METHODS)
def test_the_output_has_identity_covariance(method, group_size, layout):
    x = correlated(16, 8, 6, 6, dtype=torch.float32).contiguous(memory_format=layout)
    layer = fastbn.WhiteningBatchNorm2d(8, eps=1e-8, method=method, iterations=25, group_size=group_size)
    y = layer(x)
    # Products are float32, whose rounding is some 1e-7: times the condition number of the covariance, and 25 iterations
    # leave less than that.
    size = group_size or 8
    for start in range(0, 8, size):
        part = slice(start, start + size)
        torch.testing.assert_close(_covariance(y)[part, part], torch.eye(size).double(), rtol=0, atol=1e-4)
    between = _covariance(y)[:size, size:]
    assert group_size is None or between.abs().max() > 0.05  # groups know nothing of each other
    assert y.mean((0, 2, 3)).abs().max() < 1e-5  # likewise, of sums that cancel


def test_few_iterations_whiten_in_part():
    """Newton's iterations raise each eigenvalue of the output's covariance towards 1, and none above."""
    x = correlated(16, 8, 6, 6)
    before = torch.zeros(8, dtype=torch.float64)
    for iterations in (1, 3, 5, 9):
        layer = fastbn.WhiteningBatchNorm2d(8, dtype=torch.float64, iterations=iterations)
        values = torch.linalg.eigvalsh(_covariance(layer(x)))
        assert (values > before).all() and (values < 1).all()
        before = values


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", SHAPES)
def test_with_groups_of_one_it_is_batch_norm(dim, method, activation):
    layer = WHITENING[dim](CHANNELS, dtype=torch.float64, method=method, group_size=1, activation=activation)
    stock = STOCK[dim](CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(1 + 0.3 * normal(CHANNELS, seed=1))
        layer.bias.copy_(0.3 * normal(CHANNELS, seed=2))
    stock.load_state_dict({name: t.detach().view(-1) if t.dim() else t for name, t in layer.state_dict().items()
                           if name != "running_cov"} | {"running_var": torch.ones(CHANNELS)})  # fmt: skip
    followed = nn.Sequential(stock, nn.Identity() if activation is None else nn.ReLU())
    for seed, training in enumerate((True, True, False)):
        x, grad_out = correlated(*SHAPES[dim], seed=seed), normal(*SHAPES[dim], seed=seed + 5)
        actual, expected = step(layer.train(training), x, grad_out), step(followed.train(training), x, grad_out)
        # Both compute in float64: the results are sums of at most 72 products of numbers below 10.
        assert_same(actual, {name.replace("0.", ""): t for name, t in expected.items()}, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_mean, stock.running_mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(layer.running_cov.view(-1), stock.running_var, rtol=1e-14, atol=1e-15)
    assert layer.num_batches_tracked == stock.num_batches_tracked == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", SHAPES)
def test_evaluation_whitens_by_the_statistics_of_the_batch_that_was_seen(dim, method):
    layer = WHITENING[dim](CHANNELS, momentum=1.0, dtype=torch.float64, method=method, affine=False, group_size=2)
    x, other = correlated(*SHAPES[dim]), correlated(*SHAPES[dim], seed=1)
    layer(other)
    layer(x)
    count = x.numel() // CHANNELS
    whitening = Whitening(method, 5, 2, 1e-5)
    _, mean, cov = definition(x, whitening)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_cov, cov * count / (count - 1))
    expected, *_ = definition(other, whitening, mean, cov * count / (count - 1))
    torch.testing.assert_close(layer.eval()(other), expected)
    assert torch.equal(layer(other), layer(other))


@pytest.mark.parametrize("momentum", [0.3, None, 0.0])
def test_running_statistics_are_averages(momentum):
    layer = fastbn.WhiteningBatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64, group_size=2)
    mean, cov = torch.zeros(CHANNELS).double(), torch.eye(2).double().expand(2, 2, 2)
    for number in range(3):
        x = correlated(*SHAPES[2], seed=number)
        layer(x)
        _, batch_mean, batch_cov = definition(x, Whitening("zca", 1, 2, 1e-5))
        factor = 1 / (number + 1) if momentum is None else momentum
        mean, cov = torch.lerp(mean, batch_mean, factor), torch.lerp(cov, batch_cov * 72 / 71, factor)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_cov, cov)
        assert layer.num_batches_tracked == number + 1


def test_called_twice_before_backward():
    layer, both = _layer(method="zca"), _layer(method="zca")
    inputs = [correlated(*SHAPES[2], seed=seed).requires_grad_() for seed in (0, 1)]
    grad_out = normal(*SHAPES[2])
    alone = [torch.autograd.grad(layer(x), x, grad_out)[0] for x in inputs]
    outputs = [both(x) for x in inputs]
    for output, x, expected in zip(outputs, inputs, alone, strict=True):
        assert torch.equal(torch.autograd.grad(output, x, grad_out)[0], expected)


def test_an_empty_batch_only_counts():
    layer = _layer()
    before = copy.deepcopy(layer.state_dict())
    output = layer(torch.zeros(0, CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True))
    assert output.shape == (0, CHANNELS, 4, 4)
    output.sum().backward()
    before["num_batches_tracked"] += 1
    assert_same(dict(layer.state_dict()), dict(before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fewer_elements_than_channels(method, dtype):
    """The covariance has rank 2. Output and gradient are finite, and the directions of the data have their variance."""
    x = correlated(3, 8, dtype=dtype).requires_grad_()
    layer = fastbn.WhiteningBatchNorm1d(8, method=method, dtype=dtype, iterations=12)
    y = layer(x)
    y.backward(normal(3, 8).to(dtype))
    assert y.isfinite().all() and x.grad.isfinite().all()
    values = torch.linalg.eigvalsh(_covariance(y))
    # eps over the smaller of the two eigenvalues, some 0.5, and float32's rounding.
    torch.testing.assert_close(values[-2:], torch.ones(2).double(), rtol=0, atol=1e-4)
    # What rounding leaves in the other directions is multiplied by 1 / sqrt(eps), 316, at most.
    assert values[:-2].abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_it_works_with_what_surrounds_a_layer(method):
    layer = _layer(method=method, activation="relu", group_size=2)
    assert list(layer.state_dict()) == STATE
    x, residual = correlated(*SHAPES[2], seed=3), normal(*SHAPES[2], seed=4)
    loaded = fastbn.WhiteningBatchNorm2d(CHANNELS, dtype=torch.float64, method=method, activation="relu", group_size=2)
    loaded.load_state_dict(layer.state_dict())
    copies = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    traced = fx.symbolic_trace(nn.Sequential(copy.deepcopy(layer)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    model = nn.Sequential(copy.deepcopy(layer))
    assert type(fastbn.convert(model)[0]) is type(fastbn.freeze(model)[0]) is fastbn.WhiteningBatchNorm2d
    expected = copy.deepcopy(layer)(x)
    for other in (traced, fastbn.unfreeze(model)):
        torch.testing.assert_close(other(x), expected)
    expected = layer(x, residual)
    for other in copies:
        assert torch.equal(other(x, residual), expected)
        assert_same(dict(other.state_dict()), dict(layer.state_dict()))
    steps = ", iterations=5" if method == "iternorm" else ""
    assert repr(layer) == (
        f"WhiteningBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, method='{method}'{steps}, group_size=2, "
        "activation='relu')"
    )
    layer.reset_parameters()
    fresh = fastbn.WhiteningBatchNorm2d(CHANNELS, dtype=torch.float64, group_size=2)
    assert_same(dict(layer.state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_is_one_graph(method):
    layer = _layer(method=method, dtype=torch.float32, activation="silu")
    compiled_layer = copy.deepcopy(layer)
    torch.compiler.reset()  # which would count the layers of other tests
    compiled = torch.compile(compiled_layer, fullgraph=True, backend="aot_eager")
    x, residual, grad_out = (correlated(*SHAPES[2], seed=seed, dtype=torch.float32) for seed in range(3))
    x.requires_grad_()
    for mode in (True, False):
        outputs = [each.train(mode)(x, residual) for each in (layer, compiled)]
        grads = [torch.autograd.grad(output, (x, layer_.weight), grad_out)
                 for output, layer_ in zip(outputs, (layer, compiled_layer), strict=True)]  # fmt: skip
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    # The operations are the same, but those of elements may be merged.
    assert_same(dict(compiled_layer.named_buffers()), dict(layer.named_buffers()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_safe(use_reentrant):
    layer, once = _layer(), _layer()
    once(correlated(*SHAPES[2]))
    fastbn.checkpoint_safe(layer)
    assert isinstance(layer, fastbn.WhiteningBatchNorm2d)
    x = correlated(*SHAPES[2]).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert_same(dict(layer.named_buffers()), dict(once.named_buffers()), rtol=0, atol=0)
    assert type(fastbn.checkpoint_safe(layer, enabled=False)) is fastbn.WhiteningBatchNorm2d


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, and shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("method", METHODS)
def test_the_host_reads_nothing(method, momentum):
    layer = _layer(method=method, momentum=momentum, activation="relu")
    x = correlated(*SHAPES[2]).requires_grad_()
    with pytest.raises(AssertionError), _NoWaiting():
        x.sum().item()
    with _NoWaiting():
        layer(x, x.detach()).sum().backward()
        layer.eval()(x)
    assert x.grad is not None


def test_a_sequence_has_its_elements_in_two_dimensions():
    layer, flat = _layer(1), _layer(1)
    x = correlated(3, CHANNELS, 5)
    expected = flat(x.transpose(1, 2).reshape(15, CHANNELS)).view(3, 5, CHANNELS).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.running_cov, flat.running_cov)


@pytest.mark.parametrize("method", METHODS)
def test_vmap_and_jacobians_look_through_it(method):
    layer = _layer(1, method=method).eval()
    x = correlated(3, 5, CHANNELS)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))
    layer.train()
    whiten = lambda x: copy.deepcopy(layer)(x)  # noqa: E731
    torch.testing.assert_close(torch.func.jacrev(whiten)(x[0]), torch.autograd.functional.jacobian(whiten, x[0]))


def test_forward_mode():
    layer = _layer(1)
    x, tangent = correlated(9, CHANNELS), normal(9, CHANNELS)
    whiten = lambda x: copy.deepcopy(layer)(x)  # noqa: E731
    _, actual = torch.func.jvp(whiten, (x,), (tangent,))
    expected = torch.autograd.functional.jvp(whiten, x, tangent)[1]
    torch.testing.assert_close(actual, expected)


def test_inference_mode_records_nothing():
    layer = _layer()
    x = correlated(*SHAPES[2])
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
    with torch.inference_mode(), torch.enable_grad():
        output = layer(x)
    assert torch.equal(output, expected) and output.is_inference() and not output.requires_grad


def test_a_layer_in_a_half_type():
    layer = _layer(dtype=torch.float32).eval()
    x = correlated(*SHAPES[2])
    expected = layer(x.float())
    output = layer.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    # Input, parameters and statistics are all rounded, by 1 / 256 of their size, and the matrix, of a condition number
    # of some 5, multiplies that.
    assert (output - expected).abs().max() < 5 * 4 / 256 * expected.abs().max()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": "cholesky"}, "method: expected one of iternorm, zca, pca, got 'cholesky'"),
        ({"iterations": 0}, "iterations: expected a whole number from 1 on, got 0"),
        ({"iterations": 2.5}, "iterations: expected a whole number from 1 on, got 2.5"),
        ({"group_size": 5}, "group_size: expected a divisor of the 6 channels, got 5"),
        ({"group_size": 0}, "group_size: expected a divisor of the 6 channels, got 0"),
        ({"group_size": 2.0}, "group_size: expected a divisor of the 6 channels, got 2.0"),
        ({"activation": "nothing"}, "activation: expected one of"),
    ],
    ids=str,
)
def test_arguments_outside(options, message):
    with pytest.raises(ValueError, match=message):
        fastbn.WhiteningBatchNorm2d(6, **options)


@pytest.mark.parametrize("method", METHODS)
def test_calls_that_are_refused_move_nothing(method):
    layer = _layer(method=method)
    before = copy.deepcopy(dict(layer.state_dict()))
    x = correlated(*SHAPES[2])
    for arguments, message in (
        ((x[0],), r"expected 4D input \(got 3D input\)"),
        ((x[:1, :, :1, :1],), r"Expected more than 1 value per channel when training, got input size torch.Size\("),
        ((x.int(),), "no kernels for torch.int32"),
        ((x.float(),), "parameters of torch.float64 do not go with an input of torch.float32"),
        ((x, x[:1]), "expected residual of shape"),
        ((x[:, :3],), "not a contiguous vector of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    layer.running_cov = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected running_cov of shape \[1, 4, 4\], got \[4, 4\]"):
        layer(x)
    layer.running_cov = None
    with pytest.raises(ValueError, match="expected running_mean, running_cov and num_batches_tracked, got None"):
        layer(x)
    layer.running_cov = before["running_cov"]
    if method != "iternorm":
        x[0, 0, 0, 0] = float("nan")
        with pytest.raises(torch.linalg.LinAlgError):
            layer(x)
    assert_same(dict(layer.state_dict()), before)


def test_nobody_reads_eps_of_a_layer_with_an_activation():
    layer = _layer(activation="relu")
    with pytest.raises(TypeError, match="expected a layer without an activation where eps is read"):
        layer.eps  # noqa: B018
    layer.eps = 0.5
    x = correlated(*SHAPES[2])
    expected, *_ = definition(x, Whitening("iternorm", 5, 4, 0.5), layer.running_mean, layer.running_cov)
    expected = (expected * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)).relu()
    torch.testing.assert_close(layer.eval()(x), expected)


def test_scripting_is_refused():
    with pytest.raises(TypeError, match="expected layers with a form in TorchScript, got WhiteningBatchNorm2d"):
        torch.jit.script(nn.Sequential(fastbn.WhiteningBatchNorm2d(3)))


def test_without_parameters():
    layer, plain = _layer(affine=False), _layer()
    assert layer.weight is None and layer.bias is None and "weight" not in layer.state_dict()
    nn.init.ones_(plain.weight), nn.init.zeros_(plain.bias)
    x, grad_out = correlated(*SHAPES[2]), normal(*SHAPES[2])
    expected = {name: t for name, t in step(plain, x, grad_out).items() if name in ("output", "grad of input")}
    assert_same(step(layer, x, grad_out), expected)
