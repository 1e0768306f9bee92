"""fastbn.FrozenBatchNorm1d, 2d and 3d, and fastbn.freeze and unfreeze."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fastbn
from tests.stock import CHANNELS, SHAPES, STOCK, assert_same, normal, pair, step

FROZEN = {1: fastbn.FrozenBatchNorm1d, 2: fastbn.FrozenBatchNorm2d, 3: fastbn.FrozenBatchNorm3d}
FOUR = ["weight", "bias", "running_mean", "running_var"]


def _frozen(dim=2, **options):
    """Return a frozen layer and a torch.nn one with the same state, in evaluation and without trained parameters."""
    stock, _ = pair(dim)
    frozen = FROZEN[dim](CHANNELS, dtype=torch.float64, **options)
    frozen.load_state_dict(stock.state_dict())
    return frozen, stock.eval().requires_grad_(False)


def _model():
    stock, fast = pair(2)
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, dtype=torch.float64), stock, fast, nn.ReLU(), pair(2)[0]]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dim", SHAPES)
def test_it_normalises_by_running_statistics_in_either_mode(dim, train):
    frozen, stock = _frozen(dim)
    before = copy.deepcopy(dict(frozen.state_dict()))
    x, grad_out = normal(*SHAPES[dim]), normal(*SHAPES[dim], seed=1)
    assert_same(step(frozen.train(train), x, grad_out), step(stock, x, grad_out))
    assert_same(dict(frozen.state_dict()), before)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_residual_and_an_activation(activation):
    frozen, stock = _frozen(activation=activation)
    tensors = [normal(*SHAPES[2], seed=seed).requires_grad_() for seed in range(2)]
    expected = getattr(F, activation)(stock(tensors[0]) + tensors[1])
    output = frozen(*tensors)
    torch.testing.assert_close(output, expected)
    grad_out = normal(*SHAPES[2], seed=2)
    for grads in zip(*(torch.autograd.grad(t, tensors, grad_out) for t in (output, expected)), strict=True):
        torch.testing.assert_close(*grads)


def test_it_keeps_no_input_for_backward():
    frozen, _ = _frozen()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        frozen(normal(64, CHANNELS, 8, 8).requires_grad_())
    assert sizes and max(sizes) == CHANNELS


def test_a_trained_weight_has_a_gradient():
    frozen, stock = _frozen()
    for module in (frozen, stock):
        module.weight = nn.Parameter(module.weight.detach().clone())
        module.bias = nn.Parameter(module.bias.detach().clone())
    x, grad_out = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    actual = step(frozen, x, grad_out)
    assert set(actual) == {"output", "grad of input", "grad of weight", "grad of bias"}
    assert_same(actual, step(stock, x, grad_out))


@pytest.mark.parametrize("dim", SHAPES)
def test_its_state_is_four_buffers(dim):
    frozen, stock = _frozen(dim)
    assert list(frozen.state_dict()) == FOUR and not list(frozen.parameters())
    assert frozen.state_dict()._metadata[""] == {"version": 3}
    fresh = FROZEN[dim](CHANNELS, dtype=torch.float64)
    fresh.load_state_dict(dict(frozen.state_dict()))
    assert_same(dict(fresh.state_dict()), {name: stock.state_dict()[name] for name in FOUR})
    for missing in FOUR:
        state = dict(frozen.state_dict())
        del state[missing]
        with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
            FROZEN[dim](CHANNELS).load_state_dict(state)


class _FourBuffers(nn.Module):
    """A frozen layer as torchvision (version 1) and detectron2 (version 3) have it."""

    def __init__(self, version: int):
        super().__init__()
        self._version = version
        for name in FOUR:
            self.register_buffer(name, torch.zeros(CHANNELS, dtype=torch.float64))


@pytest.mark.parametrize("version", [1, 3])
def test_it_exchanges_states_with_frozen_layers_of_other_libraries(version):
    theirs, (frozen, _) = _FourBuffers(version), _frozen()
    theirs.load_state_dict(frozen.state_dict())
    for fresh in (fastbn.FrozenBatchNorm2d(CHANNELS), fastbn.freeze(nn.BatchNorm2d(CHANNELS))):
        fresh.double().load_state_dict(theirs.state_dict())
        torch.testing.assert_close(fresh(normal(*SHAPES[2])), frozen(normal(*SHAPES[2])))


@pytest.mark.parametrize("dim", SHAPES)
def test_inputs_of_other_dimensions(dim):
    x = torch.zeros(2, CHANNELS, *[2] * 4)
    with pytest.raises(ValueError) as expected:
        STOCK[dim](CHANNELS)(x)
    with pytest.raises(ValueError) as actual:
        FROZEN[dim](CHANNELS)(x)
    assert str(actual.value) == str(expected.value)


def test_construction():
    assert repr(fastbn.FrozenBatchNorm2d(3, activation="relu")) == "FrozenBatchNorm2d(3, eps=1e-05, activation='relu')"
    x = normal(*SHAPES[2])
    torch.testing.assert_close(fastbn.FrozenBatchNorm2d(CHANNELS, eps=0.5, dtype=x.dtype)(x), x / 1.5**0.5)
    assert fastbn.FrozenBatchNorm2d(3, device="meta", dtype=torch.float16).weight.dtype == torch.float16
    with pytest.raises(ValueError, match="activation: expected one of"):
        fastbn.FrozenBatchNorm2d(3, activation="nothing")


def test_symbolic_tracing_and_compiled():
    frozen, _ = _frozen()
    traced = fx.symbolic_trace(nn.Sequential(frozen))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = normal(*SHAPES[2])
    torch.testing.assert_close(traced(x), frozen(x))
    torch.testing.assert_close(torch.compile(frozen, fullgraph=True, backend="aot_eager")(x), frozen(x))


@pytest.mark.parametrize("affine", [True, False])
def test_freezing_and_back(affine):
    model = _model()
    model[1].bias.requires_grad_(False)
    stock = copy.deepcopy(model).eval()
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    classes, keys = [type(module) for module in model], list(model.state_dict())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert fastbn.freeze(model, affine=affine) is model
    assert [type(model[i]) for i in (1, 2, 4)] == 3 * [fastbn.FrozenBatchNorm2d]
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert left == (["0.weight", "0.bias"] if affine else trained)
    x = normal(2, CHANNELS, 6, 6)
    torch.testing.assert_close(model.train()(x), stock(x))
    assert_same(dict(model.state_dict()), dict(stock.state_dict()))
    assert fastbn.unfreeze(model) is model
    assert [type(module) for module in model] == classes and list(model.state_dict()) == keys
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model, stock, strict=True))
    model(x)
    assert not torch.equal(model[4].running_mean, stock[4].running_mean)


def test_freezing_twice_is_freezing_once():
    model = fastbn.freeze(fastbn.freeze(_model()))
    assert type(fastbn.unfreeze(model)[1]) is nn.BatchNorm2d and model[1].weight.requires_grad
    assert type(fastbn.unfreeze(fastbn.FrozenBatchNorm2d(3))) is fastbn.FrozenBatchNorm2d


def test_copies_of_a_frozen_model_can_be_unfrozen():
    model = fastbn.freeze(_model())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    x = normal(2, CHANNELS, 6, 6)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        torch.testing.assert_close(other(x), model(x))
        assert type(fastbn.unfreeze(other)[2]) is fastbn.BatchNorm2d


def test_an_activation_stays():
    layer = fastbn.BatchNorm2d(CHANNELS, activation="relu", dtype=torch.float64)
    x = normal(*SHAPES[2])
    expected = layer.eval()(x)
    torch.testing.assert_close(fastbn.freeze(layer).train()(x), expected)
    assert fastbn.unfreeze(layer).activation == "relu"


def test_states_of_frozen_and_other_layers_go_together():
    """A frozen model still has its counters; a state of four buffers leaves them alone."""
    model = fastbn.freeze(_model())
    plain = _model()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    state = {key: value for key, value in plain.state_dict().items() if "num_batches" not in key}
    counter = model[1].num_batches_tracked.clone()
    model.load_state_dict(state)
    assert torch.equal(model[1].num_batches_tracked, counter)


def test_layers_without_running_statistics_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="expected layers with running statistics, got none in 1$"):
        fastbn.freeze(model)
    assert type(model[0]) is nn.BatchNorm2d and model[0].weight.requires_grad
    for function, name in ((fastbn.freeze, "freeze"), (fastbn.unfreeze, "unfreeze")):
        with pytest.raises(TypeError, match=f"{name}: expected a torch.nn.Module, got int"):
            function(3)


def test_a_warning_names_layers_of_other_classes_whose_statistics_still_move():
    class Derived(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(2), Derived(2), Derived(2, track_running_stats=False), nn.InstanceNorm2d(2))
    with pytest.warns(UserWarning, match=r"^freeze: statistics of 1 \(Derived\) are not frozen$") as caught:
        fastbn.freeze(model)
    assert len(caught) == 1
    assert [type(module) for module in model] == [fastbn.FrozenBatchNorm2d, Derived, Derived, nn.InstanceNorm2d]


def test_other_tools_do_not_take_a_frozen_layer_for_a_batch_norm():
    frozen = nn.Sequential(fastbn.FrozenBatchNorm2d(3))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(frozen)[0]) is fastbn.FrozenBatchNorm2d
    loader = [torch.randn(4, 3, 2, 2)]
    torch.optim.swa_utils.update_bn(loader, frozen)
    assert not frozen[0].running_mean.any()


def test_it_is_one_op_per_direction():
    frozen, _ = _frozen()
    x = normal(*SHAPES[2]).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        frozen(x).sum().backward()
    names = [event.name for event in profiler.events() if event.name.startswith("fastbn::")]
    assert names == ["fastbn::batch_norm_frozen", "fastbn::batch_norm_backward"]
