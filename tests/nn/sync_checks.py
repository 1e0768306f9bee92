"""What SyncBatchNorm has to do in several processes: checks that tests/nn/test_sync.py runs, all in one spawn.

Every rank draws the whole batch and its results by torch.nn's formulas in float64, and compares its own part.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import time
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn.backends.reference.formulas import reduced_dims, wide
from fastbn.nn import sync
from fastbn.testing import assert_close_to_reference, tolerance
from tests.processes import gathered
from tests.stock import CHANNELS, normal

SHAPES = [(11, CHANNELS), (9, CHANNELS, 7), (7, CHANNELS, 4, 6), (7, CHANNELS, 2, 3, 4)]
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "silu": F.silu}


def part(rank: int, size: int, samples: int) -> slice:
    """Return the samples of a rank: one for each rank and all that are left for the last."""
    return slice(rank, rank + 1 if rank < size - 1 else samples)


def layer_of(dtype: torch.dtype = torch.float64, **options) -> fastbn.SyncBatchNorm:
    """Return a layer whose parameters and buffers are none at its initial value, and the same on all ranks."""
    layer = fastbn.SyncBatchNorm(CHANNELS, dtype=dtype, **options)
    with torch.no_grad():
        for seed, tensor in enumerate([*layer.parameters(), *layer.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(normal(*tensor.shape, seed=90 + seed).abs() + 0.5)
            else:
                tensor.fill_(2)
    return layer


class Expected:
    """Output, gradients and buffers of one process with the whole batch, in float64, and bounds on their errors."""

    def __init__(self, layer, x: Tensor, residual: Tensor | None, grad_out: Tensor, activation: str | None):
        dtype, count = x.dtype, x.numel() // x.shape[1]
        double = copy.deepcopy(layer).double()
        self.x, residual = (None if t is None else t.double().requires_grad_() for t in (x, residual))
        dims, eps, g = reduced_dims(x), vars(layer)["eps"], grad_out.double()
        var, mean = torch.var_mean(self.x, dims, correction=0)
        xhat = (self.x - wide(self.x, mean)) * wide(self.x, (var + eps).rsqrt())
        z = xhat if double.weight is None else xhat * wide(self.x, double.weight) + wide(self.x, double.bias)
        z = z if residual is None else z + residual
        self.output = ACTIVATIONS[activation](z)
        parameters = list(double.parameters())
        (self.grad_z,) = torch.autograd.grad(self.output, z, g, retain_graph=True)
        given = [self.x, *([] if residual is None else [residual]), *parameters]
        grads = torch.autograd.grad(self.output, given, g, create_graph=True)
        self.grad_input, self.grad_parameters = grads[0], grads[len(grads) - len(parameters) :]
        self.grad_residual = None if residual is None else grads[1]
        self.mean, self.var, self.count = mean.detach(), var.detach(), count
        self.unbiased = self.var * count / (count - 1)

        z_scale, xhat_scale, grad_scale = (t.detach().abs().max() for t in (z, xhat, g))
        slope = (var + eps).rsqrt() if double.weight is None else double.weight.abs() * (var + eps).rsqrt()
        steepness = (mean.abs() / var.sqrt()).max().detach()
        self.allowed_output = tolerance.forward_tolerance(dtype, count, z_scale, steepness)
        element = tolerance.activation_tolerance(dtype, grad_scale, z_scale)
        # What the rounding of the mean to float64 moves xhat by, it moves the gradient by.
        element = element + 8 * torch.finfo(torch.float64).eps * steepness * (1 + xhat_scale) * grad_scale
        terms = tolerance.input_gradient_terms(grad_scale, xhat_scale, True)
        slope = slope.detach().max()
        self.allowed_grad_z = element + tolerance.ulp(dtype, grad_scale)
        self.allowed_grad_input = tolerance.input_gradient_tolerance(
            dtype, count, terms, slope, xhat_scale, element, True
        ) + tolerance.ulp(dtype, terms * slope)
        self.allowed_parameters = tolerance.weight_gradient_tolerance(
            dtype, count, count * grad_scale, count * grad_scale * xhat_scale, xhat_scale, element
        )


def run(rank, size, layer, x, residual=None, *, activation=None, expected=None):
    """Run a forward and a backward on this rank's part of `x`, and compare with the whole batch in one process."""
    rows = part(rank, size, len(x))
    grad_out = normal(*x.shape, seed=77).to(x.dtype)
    expected = expected or Expected(layer, x, residual, grad_out, activation)
    own, own_residual = (None if t is None else t[rows].detach().requires_grad_() for t in (x, residual))
    output = layer(own, own_residual)
    given = [own, *([] if residual is None else [own_residual]), *layer.parameters()]
    grads = torch.autograd.grad(output, given, grad_out[rows])
    assert_close_to_reference(output, expected.output[rows], expected.allowed_output, "output")
    assert_close_to_reference(grads[0], expected.grad_input[rows], expected.allowed_grad_input, "grad of input")
    if residual is not None:
        assert_close_to_reference(grads[1], expected.grad_residual[rows], expected.allowed_grad_z, "grad of residual")
    for local, whole in zip(grads[len(grads) - len(expected.grad_parameters) :], expected.grad_parameters, strict=True):
        # Each rank rounds its own sum to the parameter's dtype.
        sums = torch.stack(gathered(local))
        rounding = size * tolerance.ulp(local.dtype, sums.abs().max())
        allowed = expected.allowed_parameters + rounding
        assert_close_to_reference(sums.double().sum(0), whole, allowed, "grad of a parameter")
    return expected, output, grads


def assert_moved(layer, before, expected, factor):
    """Assert that the running statistics moved by `factor` towards those of the whole batch, as on all other ranks."""
    for name, batch in (("running_mean", expected.mean), ("running_var", expected.unbiased)):
        exact = before[name].double() * (1 - factor) + batch * factor
        dtype, actual = before[name].dtype, getattr(layer, name)
        # Those of the batch were summed in the input's dtype, about a pivot.
        spread = expected.var if name == "running_var" else expected.var.sqrt() * 4
        allowed = factor * tolerance.sum_tolerance(expected.x.dtype, expected.count, 4 * spread)
        rounding = 4 * tolerance.ulp(torch.float64, expected.mean) * (1 + 2 * expected.var.sqrt())
        assert_close_to_reference(actual, exact, allowed + rounding + tolerance.ulp(dtype, exact), name)
        assert all(torch.equal(actual, other) for other in gathered(actual)), name
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def check_shapes(rank, size):
    for shape in SHAPES:
        layer = layer_of(momentum=0.3)
        before = copy.deepcopy(layer.state_dict())
        expected, *_ = run(rank, size, layer, normal(*shape))
        assert_moved(layer, before, expected, 0.3)


def check_a_residual_and_an_activation(rank, size):
    for activation in ("relu", "silu"):
        for shape in SHAPES:
            layer = layer_of(activation=activation)
            run(rank, size, layer, normal(*shape), normal(*shape, seed=1), activation=activation)


def check_the_cumulative_average(rank, size):
    layer = layer_of(momentum=None)
    for seed in range(3):
        before = copy.deepcopy(layer.state_dict())
        expected, *_ = run(rank, size, layer, normal(*SHAPES[2], seed=seed))
        assert_moved(layer, before, expected, 1 / (3 + seed))


def check_dtypes_and_formats(rank, size):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for parameters in dict.fromkeys((torch.float32, dtype)):
            for shape in SHAPES[2:]:
                x, residual = (
                    normal(*shape, seed=seed).to(dtype).contiguous(memory_format=formats[len(shape)])
                    for seed in range(2)
                )
                layer = layer_of(parameters, activation="silu")
                before = copy.deepcopy(layer.state_dict())
                expected, output, grads = run(rank, size, layer, x, residual, activation="silu")
                assert output.dtype == dtype and grads[-1].dtype == parameters
                if rank == size - 1:  # one sample alone is dense in more than one format
                    for tensor in (output, grads[0], grads[1]):
                        assert tensor.is_contiguous(memory_format=formats[len(shape)])
                assert_moved(layer, before, expected, 0.1)


def check_a_mean_far_from_zero(rank, size):
    """Raw sums of squares would lose every digit of the variance: 1e-4 beside 1e8."""
    for dtype in (torch.float64, torch.float32):
        x = (normal(*SHAPES[2]) * 1e-2 + 1e4 + 1e-2 * torch.arange(7).view(7, 1, 1, 1)).to(dtype)
        layer = layer_of(dtype)
        before = copy.deepcopy(layer.state_dict())
        expected, *_ = run(rank, size, layer, x)
        assert_moved(layer, before, expected, 0.1)


def check_a_constant_channel_gives_its_bias(rank, size):
    for value in (0.1, 0.7, 1e4 / 3, 1e30):
        for bias in (0.0, 0.3):  # beside 0 the smallest error shows
            layer = layer_of(torch.float32)
            nn.init.constant_(layer.bias, bias)
            x = torch.full((3 + 4 * rank, CHANNELS, 3, 3), value)
            assert torch.equal(layer(x), torch.full_like(x, bias))


def check_ranks_without_elements(rank, size):
    """The last rank has all; the others take part in both collectives, whether their input needs a gradient or not."""
    for shape in SHAPES:
        for needs in (True, False):
            layer, x, residual = layer_of(activation="relu"), normal(*shape), normal(*shape, seed=1)
            grad_out = normal(*shape, seed=77)
            before = copy.deepcopy(layer.state_dict())
            expected = Expected(layer, x, residual, grad_out, "relu")
            rows = slice(0, 0) if rank < size - 1 else slice(0, len(x))
            own, own_residual = x[rows].detach(), residual[rows].detach()
            for tensor in (own, own_residual):
                tensor.requires_grad_(needs or rank == size - 1)
            output = layer(own, own_residual)
            output.backward(grad_out[rows])
            assert output.shape == own.shape
            assert_close_to_reference(output, expected.output[rows], expected.allowed_output, "output")
            if own.requires_grad:
                assert_close_to_reference(own.grad, expected.grad_input[rows], expected.allowed_grad_input, "grad")
            for parameter, whole in zip(layer.parameters(), expected.grad_parameters, strict=True):
                allowed = expected.allowed_parameters + tolerance.ulp(torch.float64, whole.detach().abs().max())
                right = whole if rank == size - 1 else torch.zeros_like(whole)
                assert_close_to_reference(parameter.grad, right, allowed, "grad of a parameter")
            assert_moved(layer, before, expected, 0.1)


def check_no_elements_at_all(rank, size):
    """As torch.nn's layers in one process: the batch is counted, and the averages stay."""
    for momentum in (0.1, None):
        layer, stock = layer_of(momentum=momentum), nn.BatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64)
        stock.load_state_dict(layer.state_dict())
        x = torch.zeros(0, CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        stock(x.detach())
        assert output.shape == x.grad.shape == x.shape
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), stock.buffers(), strict=True))
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


def check_one_value_per_rank(rank, size):
    """Enough, since others have one too; of a single one over all ranks only the host would know after a wait."""
    layer, x = layer_of(), normal(size, CHANNELS)
    before = copy.deepcopy(layer.state_dict())
    expected, *_ = run(rank, size, layer, x)
    assert_moved(layer, before, expected, 0.1)
    before = copy.deepcopy(layer.state_dict())
    output = layer(x[rank : rank + (rank == 0)])
    assert torch.equal(output, layer.bias.expand(len(output), CHANNELS))
    assert torch.equal(layer.running_var, before["running_var"])
    torch.testing.assert_close(layer.running_mean, 0.9 * before["running_mean"] + 0.1 * x[0])


def check_two_calls_before_backward(rank, size):
    layer, x, y = layer_of(), normal(*SHAPES[2]), normal(*SHAPES[2], seed=5) * 3 + 1
    grad_out = normal(*x.shape, seed=77)
    expected = [Expected(layer, t, None, grad_out, None) for t in (x, y)]
    rows = part(rank, size, len(x))
    given = [t[rows].detach().requires_grad_() for t in (x, y)]
    outputs = [layer(t) for t in given]
    for output, right in zip(outputs, expected, strict=True):
        assert_close_to_reference(output, right.output[rows], right.allowed_output, "output")
    (outputs[0] * grad_out[rows] + outputs[1] * grad_out[rows]).sum().backward()
    for tensor, right in zip(given, expected, strict=True):
        assert_close_to_reference(tensor.grad, right.grad_input[rows], right.allowed_grad_input, "grad of input")


class Recorder(TorchDispatchMode):
    """Counts collectives with the shape and dtype of what they take, and refuses what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "index"), name
        if "c10d" in func.namespace and name != "wait_tensor":
            self.seen[name, tuple(args[0].shape), args[0].dtype] += 1
        return func(*args, **(kwargs or {}))


FORWARD = ("all_gather_into_tensor", (2 * CHANNELS + 1,), torch.float64)
BACKWARD = ("all_reduce", (2 * CHANNELS,), torch.float64)


def check_one_collective_a_direction_and_no_wait(rank, size):
    for dtype, parameters in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        for momentum in (0.1, None):
            layer = layer_of(parameters, momentum=momentum, activation="relu")
            x = normal(3 + rank, *SHAPES[2][1:]).to(dtype).requires_grad_()
            residual = torch.zeros_like(x)
            with Recorder() as recorder:
                output = layer(x, residual)
            assert recorder.seen == {FORWARD: 1}
            with Recorder() as recorder, torch.autograd.set_multithreading_enabled(False):
                output.sum().backward()
            assert recorder.seen == {BACKWARD: 1}


def check_ranks_that_need_fewer_gradients(rank, size):
    """Rank 0 wants nothing but the gradient of the bias, the others that of the input too."""
    layer, x = layer_of(), normal(*SHAPES[2])
    grad_out = normal(*x.shape, seed=77)
    expected = Expected(layer, x, None, grad_out, None)
    rows = part(rank, size, len(x))
    own = x[rows].detach().requires_grad_(rank > 0)
    layer.weight.requires_grad_(rank > 0)
    layer(own).backward(grad_out[rows])
    if rank > 0:
        assert_close_to_reference(own.grad, expected.grad_input[rows], expected.allowed_grad_input, "grad of input")
    total = sum(gathered(layer.bias.grad))
    allowed = expected.allowed_parameters + tolerance.ulp(torch.float64, expected.grad_parameters[1].detach())
    assert_close_to_reference(total, expected.grad_parameters[1], allowed, "grad of bias")


def check_layers_without_parameters_or_statistics(rank, size):
    for options in ({"affine": False}, {"track_running_stats": False}):
        layer = layer_of(**options)
        run(rank, size, layer, normal(*SHAPES[2]))
    layer.eval()
    x = normal(3 + rank, *SHAPES[2][1:])
    plain = fastbn.BatchNorm2d(CHANNELS, track_running_stats=False, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))  # of its own batch, as torch.nn.SyncBatchNorm


def _assert_local(layer, x):
    """Assert that a layer does exactly what fastbn.BatchNorm2d does, with no collective."""
    plain = fastbn.BatchNorm2d(CHANNELS, momentum=layer.momentum, dtype=layer.weight.dtype).train(layer.training)
    plain.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, plain):
        own = x.detach().requires_grad_()
        with Recorder() if module is layer else contextlib.nullcontext() as recorder:
            output = module(own, own)
            output.square().sum().backward()
        assert recorder is None or not recorder.seen
        results.append([output, own.grad, module.weight.grad, module.bias.grad, *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_evaluation_is_local(rank, size):
    for dtype in (torch.float64, torch.float32):
        _assert_local(layer_of(dtype).eval(), normal(3 + rank, *SHAPES[2][1:]).to(dtype))


def check_groups(rank, size):
    """A group of one is local, and so is a process outside of the group; the others share statistics."""
    alone = [distributed.new_group([other]) for other in range(size)][rank]
    first = distributed.new_group([0])
    for group in (alone, first):
        _assert_local(layer_of(process_group=group), normal(3 + rank, *SHAPES[2][1:]))
    everybody = distributed.new_group(list(range(size)))
    run(rank, size, layer_of(process_group=everybody), normal(*SHAPES[2]))


def check_groups_that_are_subsets(rank, size):
    """Two groups of two at once: each has the statistics of its own half of the batch."""
    groups = [distributed.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    own = 0 if rank in (0, 3) else 1
    layer, x = layer_of(process_group=groups[own]), normal(*SHAPES[2], seed=own)
    before = copy.deepcopy(layer.state_dict())
    grad_out = normal(*x.shape, seed=77)
    expected = Expected(layer, x, None, grad_out, None)
    rows = slice(0, 2) if rank in (0, 1) else slice(2, len(x))
    given = x[rows].detach().requires_grad_()
    output = layer(given)
    output.backward(grad_out[rows])
    assert_close_to_reference(output, expected.output[rows], expected.allowed_output, "output")
    assert_close_to_reference(given.grad, expected.grad_input[rows], expected.allowed_grad_input, "grad of input")
    torch.testing.assert_close(layer.running_mean, 0.9 * before["running_mean"] + 0.1 * expected.mean)


def check_copies(rank, size):
    group = distributed.new_group(list(range(size)))
    layer = layer_of(process_group=group, activation="relu")
    copied = copy.deepcopy(nn.Sequential(layer, layer))
    assert copied[0] is copied[1] is not layer and copied[0].process_group is group
    assert copied[0].weight is not layer.weight and torch.equal(copied[0].weight, layer.weight)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    loaded = fastbn.SyncBatchNorm(CHANNELS, dtype=torch.float64, activation="relu")
    loaded.load_state_dict(torch.load(stored))
    x = normal(3 + rank, *SHAPES[2][1:])
    expected = layer(x)
    for other in (copied[0], loaded):
        assert torch.equal(other(x), expected)


def check_second_derivatives(rank, size):
    """Of the sum over ranks of what each makes of its gradients, as one process has it."""
    for activation in (None, "silu"):
        layer, x = layer_of(activation=activation), normal(7, CHANNELS, 3)
        grad_out, v, w = (normal(*shape, seed=60 + i) for i, shape in enumerate([x.shape, x.shape, (CHANNELS,)]))
        expected = Expected(layer, x, None, grad_out, activation)
        function = (expected.grad_input * v).sum() + (expected.grad_parameters[0] * w).sum()
        (right,) = torch.autograd.grad(function, expected.x)
        rows = part(rank, size, len(x))
        own = x[rows].detach().requires_grad_()
        grad_input, grad_weight = torch.autograd.grad(
            layer(own), [own, layer.weight], grad_out[rows], create_graph=True
        )
        (second,) = torch.autograd.grad((grad_input * v[rows]).sum() + (grad_weight * w).sum(), own)
        # As gradgradcheck compares; both are some hundred operations in float64 on numbers of about 1.
        torch.testing.assert_close(second, right[rows], rtol=0, atol=1e-10)


def _compiled(rank, size, backend):
    for dtype in (torch.float64, torch.float32):
        layer = layer_of(dtype, activation="relu")
        x = normal(4 + rank, *SHAPES[2][1:]).to(dtype).contiguous(memory_format=torch.channels_last)
        residual, grad_out = torch.ones_like(x), normal(*x.shape, seed=3).to(dtype)
        results = []
        for module in (layer, torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)):
            own = x.detach().requires_grad_()
            for _ in range(2):
                output = module(own, residual)
                (grad,) = torch.autograd.grad(output, own, grad_out)
            results.append([output, grad, *module.buffers()])
        for eager, compiled in zip(*results, strict=True):
            # The collectives and our ops are the same; the compiler may only reorder float64 vectors of C elements.
            torch.testing.assert_close(compiled, eager)
    torch.compiler.reset()


def check_a_compiled_graph_has_no_break(rank, size):
    _compiled(rank, size, "aot_eager")


def check_inductor(rank, size):
    _compiled(rank, size, "inductor")
    before, sync.MAX_GATHERED_RANKS = sync.MAX_GATHERED_RANKS, 1
    _compiled(rank, size, "inductor")
    sync.MAX_GATHERED_RANKS = before


def check_large_groups_add_up(rank, size):
    """Two sums in place of the gather, with the same digits."""
    before, sync.MAX_GATHERED_RANKS = sync.MAX_GATHERED_RANKS, 1
    try:
        for check in (
            check_shapes,
            check_a_mean_far_from_zero,
            check_a_constant_channel_gives_its_bias,
            check_ranks_without_elements,
            check_no_elements_at_all,
            check_one_value_per_rank,
            check_second_derivatives,
        ):
            check(rank, size)
        x = normal(3 + rank, *SHAPES[2][1:])
        with Recorder() as recorder:
            layer_of()(x)
        sums = (("all_reduce", (CHANNELS + 1,), torch.float64), ("all_reduce", (CHANNELS,), torch.float64))
        assert recorder.seen == dict.fromkeys(sums, 1)
    finally:
        sync.MAX_GATHERED_RANKS = before


class Block(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, padding=1), norm(3)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), norm(3), nn.ReLU(), Block(norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
    ).double()


def check_fused_models(rank, size):
    """Each layer is one op with what follows it, with one collective a direction, in one process's numbers."""
    model, stock, x = fastbn.convert(network(), sync=True), network(), normal(6, 2, 8, 8)
    kinds = [layer.outcome for layer in fastbn.transforms.report(model).layers]
    assert kinds == ["fused with relu", "fused with relu", "fused with addition and relu"]
    rows = part(rank, size, len(x))
    with Recorder() as recorder:
        output = model(x[rows])
    assert sum(recorder.seen.values()) == 3
    # Two sums of tens of products of about 1, in different orders: some 1e2 roundings of 1e-16.
    torch.testing.assert_close(output, stock(x)[rows], rtol=0, atol=1e-12)
    assert [type(m) for m in fastbn.revert(model).modules()] == [type(m) for m in stock.modules()]
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def check_converted_from_torch(rank, size):
    """torch.nn.SyncBatchNorm refuses a CPU; by `convert` it works, from torch's own conversion too."""
    x, stock = normal(6, 2, 8, 8), network()
    expected = stock(x)
    rows = part(rank, size, len(x))
    for model in (network(nn.SyncBatchNorm), nn.SyncBatchNorm.convert_sync_batchnorm(network())):
        torch.testing.assert_close(fastbn.convert(model)(x[rows]), expected[rows], rtol=0, atol=1e-12)
    model = fastbn.SyncBatchNorm.convert_sync_batchnorm(fastbn.convert(network()))
    torch.testing.assert_close(model(x[rows]), expected[rows], rtol=0, atol=1e-12)


def check_recomputed_forwards(rank, size):
    from torch.utils.checkpoint import checkpoint

    model = fastbn.convert(network(), sync=True, checkpoint_safe=True)
    twin, x = copy.deepcopy(model), normal(4 + rank, 2, 8, 8).requires_grad_()
    twin(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def check_data_parallel_training(rank, size):
    """DistributedDataParallel with synchronised layers takes the steps that one process takes with the whole batch.

    Every rank has the same number of samples, since the average of gradients over ranks is that over samples only then.
    """
    model = DistributedDataParallel(fastbn.convert(network(), sync=True))
    stock = network()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, stock)]
    rows = slice(4 * rank, 4 * rank + 4)
    for seed in range(5):
        x, labels = normal(4 * size, 2, 8, 8, seed=seed), torch.arange(4 * size) % 4
        for module, optimiser, own in zip((model, stock), optimisers, (rows, slice(None)), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(module(x[own]), labels[own]).backward()
            optimiser.step()
    # Rounding errors of 1e-16, which each step may multiply by about ten; a step that were wrong would differ by 1e-3.
    for (name, ours), theirs in zip(model.module.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    for ours, theirs in zip(model.module.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def check_what_is_refused(rank, size):
    """All ranks refuse, so none waits, and nothing has moved."""
    layer = layer_of()
    before = copy.deepcopy(dict(layer.state_dict()))
    x = normal(*SHAPES[2])
    for call, message in (
        (lambda: layer(x[0, :, 0, 0]), "expected at least 2D input (got 1D input)"),
        (lambda: layer(x[:, :0]), "SyncBatchNorm number of input channels should be non-zero"),
        (lambda: layer(x[:, :3]), "not a contiguous vector of 3"),
        (lambda: layer(x.int()), "no kernels for torch.int32"),
        (lambda: layer(x, x[:1]), "expected residual of shape"),
        (lambda: torch.func.vmap(layer)(x[None]), "functorch"),
    ):
        try:
            call()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"expected a ValueError: {message}")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def check_a_rank_that_dies(rank, size):
    """Rank 0 leaves within a step; the others get an error of torch.distributed, and their buffers have not moved."""
    layer, x = layer_of(), normal(*SHAPES[2]).requires_grad_()
    output = layer(x)
    before = copy.deepcopy(dict(layer.state_dict()))
    if rank == 0:
        os._exit(0)
    for call in (lambda: layer(x), lambda: output.sum().backward()):
        try:
            call()
        except RuntimeError as error:
            assert "gloo" in str(error), error
        else:
            raise AssertionError("expected a RuntimeError of gloo")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def check_a_rank_that_does_not_come(rank, size):
    """Rank 0 sleeps for longer than the timeout."""
    layer, x = layer_of(), normal(*SHAPES[2])
    start = time.monotonic()
    if rank == 0:
        time.sleep(12)
        return
    try:
        layer(x)
    except RuntimeError as error:
        assert "imed out" in str(error) and time.monotonic() - start < 10, error
    else:
        raise AssertionError("expected a RuntimeError of gloo")


# By name, in the order in which they run.
ALL = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
SLOW = {name: ALL.pop(name) for name in ("inductor", "groups_that_are_subsets", "a_rank_that_does_not_come")}
