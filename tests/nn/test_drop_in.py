"""Code around a BatchNorm takes fastbn's for torch's: checkpoints, copies, tools, symbolic tracing."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import fx, nn

import fastbn
from tests.stock import FAST, SHAPES, STOCK, assert_same, assert_same_buffers, normal, pair, step


@pytest.mark.parametrize("dim", SHAPES)
def test_state_dict(dim):
    stock, fast = pair(dim)
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert fast.state_dict()._metadata == stock.state_dict()._metadata and fast._version == 2
    assert_same(dict(fast.state_dict()), dict(stock.state_dict()))
    assert repr(fast) == repr(stock)
    for source, target in ((fast, STOCK[dim](5)), (stock, FAST[dim](5))):
        target.double().load_state_dict(source.state_dict())
        assert_same(dict(target.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("version", [None, 1])
def test_checkpoints_from_before_the_counter(version):
    _, fast = pair()
    state = fast.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        fastbn.BatchNorm2d(5).load_state_dict(state)
    state._metadata[""] = {} if version is None else {"version": version}
    fresh = fastbn.BatchNorm2d(5, dtype=torch.float64)
    fresh.load_state_dict(state)
    assert fresh.num_batches_tracked.item() == 0
    torch.testing.assert_close(fresh.running_var, fast.running_var)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_copies(activation):
    _, fast = pair()
    fast.activation = activation
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(stream, weights_only=False),
    ]
    x = normal(*SHAPES[2])
    expected = step(fast, x, x)
    for other in copies:
        assert type(other) is fastbn.BatchNorm2d and other.activation == activation
        assert_same(step(other, x, x), expected)
        assert_same_buffers(other, fast)


def test_a_float_model_made_half_and_moved():
    _, fast = pair(dtype=torch.float32)
    assert fast.half().weight.dtype == fast.running_mean.dtype == torch.float16
    assert fast(normal(*SHAPES[2], dtype=torch.float16)).dtype == torch.float16
    assert fast.to("meta")(torch.empty(SHAPES[2], dtype=torch.float16, device="meta")).device.type == "meta"


@pytest.mark.parametrize("dim", SHAPES)
def test_types(dim):
    fast = FAST[dim](5)
    assert isinstance(fast, STOCK[dim]) and isinstance(fast, nn.modules.batchnorm._BatchNorm)
    assert type(fast).__name__ == STOCK[dim].__name__
    with pytest.raises(ValueError, match="activation: expected one of none, relu,.* got 'selu'"):
        FAST[dim](5, activation="selu")
    assert "activation='relu'" in repr(FAST[dim](5, activation="relu"))


def test_update_bn_of_swa_utils():
    batches = [normal(*SHAPES[2], seed=seed) + seed for seed in range(3)]
    modules = pair()
    for module in modules:
        torch.optim.swa_utils.update_bn(batches, nn.Sequential(module))
    assert_same_buffers(*reversed(modules))
    torch.testing.assert_close(modules[1].running_mean, torch.cat(batches).mean((0, 2, 3)))


def test_conversion_to_sync_batch_norm():
    _, fast = pair()
    expected = dict(fast.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fast, fastbn.BatchNorm1d(3)))
    assert [type(module) for module in model] == [nn.SyncBatchNorm] * 2
    assert_same(dict(model[0].state_dict()), expected)
    with pytest.raises(TypeError, match="expected a layer without an activation where num_features is read"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fastbn.BatchNorm2d(3, activation="relu")))


def test_replacing_the_running_statistics_for_functorch():
    model = nn.Sequential(pair()[1])
    torch.func.replace_all_batch_norm_modules_(model)
    assert model[0].running_mean is None and not model[0].track_running_stats


def test_symbolic_tracing_keeps_the_module():
    stock, fast = pair()

    class Block(nn.Module):
        def __init__(self, bn):
            super().__init__()
            self.inner = nn.Sequential(bn)

        def forward(self, x):
            return self.inner(x).relu()

    graphs = [fx.symbolic_trace(Block(bn)) for bn in (fast, stock)]
    assert graphs[0].code == graphs[1].code
    x = normal(*SHAPES[2])
    for training in (True, False):
        torch.testing.assert_close(*(graph.train(training)(x) for graph in graphs))
    assert_same_buffers(fast, stock)


def test_symbolic_tracing_with_a_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = pair()[1]

        def forward(self, x, residual):
            return self.bn(x, residual)

    block = Block()
    x, residual = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    torch.testing.assert_close(fx.symbolic_trace(block)(x, residual), block(x, residual))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        bn = fastbn.BatchNorm2d(5)
        x = torch.empty(3, 5, 4, 6, requires_grad=True).to(memory_format=torch.channels_last)
        output = bn(x)
        assert output.shape == x.shape and output.is_contiguous(memory_format=torch.channels_last)
        output.sum().backward()
        assert bn.weight.grad.shape == (5,)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    modules = pair()
    results = []
    for module in modules:
        x = normal(*SHAPES[2]).requires_grad_()
        output = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=use_reentrant)
        output.square().sum().backward()
        results.append({"output": output.detach(), "x": x.grad, "weight": module.weight.grad})
    assert_same(results[1], results[0])
    assert_same_buffers(*reversed(modules))


def _delete_counter(layer):
    layer.eval()
    del layer.num_batches_tracked


def _delete_statistics(layer):
    layer.track_running_stats = False
    del layer.running_mean, layer.running_var, layer.num_batches_tracked


def _override_by_property(layer):
    clamped = property(lambda self: self._buffers["running_var"].clamp(min=4.0))
    layer.__class__ = type("Clamped", (type(layer),), {"running_var": clamped})
    layer.eval()


def _override_in_instance(layer):
    layer.__dict__["weight"] = torch.full((4,), 3.0)


def _negative_mean(layer):
    layer.running_mean = torch.zeros(4, dtype=torch.cfloat).conj().imag


def _negative_variance(layer):
    layer.running_var = torch.full((4,), -1j, dtype=torch.cfloat).conj().imag


@pytest.mark.parametrize(
    "change",
    [
        _delete_counter,
        _delete_statistics,
        _override_by_property,
        _override_in_instance,
        _negative_mean,
        _negative_variance,
    ],
)
def test_tensors_that_are_missing_or_replaced_are_those_of_torch(change):
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    layers = nn.BatchNorm2d(4), fastbn.BatchNorm2d(4)
    for layer in layers:
        change(layer)
    torch.testing.assert_close(layers[1](x), layers[0](x))
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    torch.testing.assert_close(dict(layers[1].named_buffers()), dict(layers[0].named_buffers()))


def test_buffers_stay_where_the_input_cannot_be_saved():
    with torch.inference_mode():
        x = torch.randn(5, 4, 3, 3)
    layer = fastbn.BatchNorm2d(4)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(x)
    torch.testing.assert_close(dict(layer.named_buffers()), before)
    with torch.inference_mode():
        layer(x)
    assert layer.num_batches_tracked.item() == 1
