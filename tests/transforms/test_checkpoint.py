"""fastbn.checkpoint_safe: running statistics and counter move once a step, whatever runs a forward again."""

from __future__ import annotations

import copy
import functools
import pickle
import socket

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import fastbn
from fastbn import _torch
from fastbn.nn import saving
from fastbn.transforms.fuse import layers
from fastbn.transforms.registry import _trained
from tests.stock import assert_same, normal
from tests.transforms.fused import recorded_calls

# Gradients of convolutions sum over batch and image in float32. Fused calls and compilers round the terms otherwise.
OTHER_ORDER = {"rtol": 5e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net(norm=fastbn.BatchNorm2d, **options):
    torch.manual_seed(0)
    # A bias before a normalisation would have a gradient of rounding errors alone.
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 1, bias=False)
    return nn.Sequential(first, norm(4, **options), nn.ReLU(), second, norm(4, **options), nn.ReLU())


def _saves_convolutions(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "convolution" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _saves_all(context, op, *args, **kwargs):
    """All but what changes its argument, as the counter of torch's own layers: that cannot be saved."""
    return CheckpointPolicy.PREFER_RECOMPUTE if "add_" in str(op) else CheckpointPolicy.MUST_SAVE


def _selective(policy):
    return functools.partial(create_selective_checkpoint_contexts, policy)


MODES = {
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": _selective(_saves_convolutions)},
    "selective, all saved": {"use_reentrant": False, "context_fn": _selective(_saves_all)},
}
LAYERS = {
    "fastbn": net,
    "fastbn, cumulative": functools.partial(net, momentum=None),
    "fastbn with relu": functools.partial(net, activation="relu"),
    "torch": functools.partial(net, nn.BatchNorm2d),
    "torch, cumulative": functools.partial(net, nn.BatchNorm2d, momentum=None),
    "SyncBatchNorm": functools.partial(net, nn.SyncBatchNorm),  # without a process group, as the others
    "a subclass": functools.partial(net, type("Mine", (fastbn.BatchNorm2d,), {})),
}


def steps(model, forward, count=2):
    """Return output, gradients and buffers after some steps."""
    results = {}
    for seed in range(count):
        x = normal(4, 3, 6, 6, seed=seed, dtype=torch.float32).requires_grad_()
        output = forward(x)
        output.square().sum().backward()
        results |= {f"output {seed}": output.detach(), f"grad {seed}": x.grad}
    results |= {name: p.grad for name, p in model.named_parameters()}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def expected(make, count=2):
    model = make()
    return steps(model, model, count)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_that_without_a_checkpoint(name, mode):
    """Bit for bit: outputs, gradients, and buffers."""
    model = fastbn.checkpoint_safe(LAYERS[name]())
    actual = steps(model, lambda x: checkpoint(model, x, **MODES[mode]))
    assert model[1].num_batches_tracked == 2
    assert_same(actual, expected(LAYERS[name]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fastbn", "torch"])
def test_without_it_statistics_move_twice(name):
    """The test above would not fail otherwise."""
    model = LAYERS[name]()
    steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", ["non-reentrant", "reentrant"])
def test_nested_checkpoints(outer, inner):
    model = fastbn.checkpoint_safe(net())

    def forward(x):
        return checkpoint(model[3:], checkpoint(model[:3], x, **MODES[inner]), **MODES[outer])

    def nested(x):
        return checkpoint(lambda x: checkpoint(model, x, **MODES[inner]), x, **MODES[outer])

    for run in (forward, nested):
        model = fastbn.checkpoint_safe(net())
        assert_same(steps(model, run), expected(net), rtol=0, atol=0)


def test_checkpoint_sequential():
    model = fastbn.checkpoint_safe(net())
    actual = steps(model, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False))
    assert_same(actual, expected(net), rtol=0, atol=0)


@pytest.mark.parametrize("early", [True, False])
def test_early_stop(early):
    """The recomputation ends, by an exception, inside the last layer that saves something."""
    model = fastbn.checkpoint_safe(net()[:2])
    with set_checkpoint_early_stop(early):
        actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert_same(actual, expected(lambda: net()[:2]), rtol=0, atol=0)


def test_a_layer_that_is_called_twice():
    def forward(model, x, call):
        return call(model[1], call(model[1], model[0](x)))

    model, plain = fastbn.checkpoint_safe(net()[:2]), net()[:2]
    actual = steps(model, lambda x: forward(model, x, lambda f, x: checkpoint(f, x, use_reentrant=False)))
    assert model[1].num_batches_tracked == 4
    assert_same(actual, steps(plain, lambda x: forward(plain, x, lambda f, x: f(x))), rtol=0, atol=0)


def test_a_second_backward_through_the_same_graph():
    model = fastbn.checkpoint_safe(net())
    x = normal(4, 3, 6, 6, dtype=torch.float32).requires_grad_()
    output = checkpoint(model, x, use_reentrant=False).sum()
    output.backward(retain_graph=True)
    output.backward()
    assert model[1].num_batches_tracked == 1


def test_another_recomputation_in_backward():
    """As reversible networks do: a function that runs its forward again in its own backward."""

    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, model, x):
            ctx.model = model
            ctx.save_for_backward(x)
            return model(x)

        @staticmethod
        def backward(ctx, grad_out):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                ctx.model(x).backward(grad_out)
            return None, x.grad

    model = fastbn.checkpoint_safe(net())
    assert_same(steps(model, lambda x: Recomputes.apply(model, x)), expected(net), rtol=0, atol=0)


def test_a_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 3, 1), fastbn.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.norm(self.conv(x), residual=x)

    model = fastbn.checkpoint_safe(Block())
    assert_same(steps(model, lambda x: checkpoint(model, x, use_reentrant=False)), expected(Block), rtol=0, atol=0)


def test_the_layer_never_holds_other_values():
    """Another thread may read its state while backward runs."""
    model = fastbn.checkpoint_safe(net())
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(copy.deepcopy(module.state_dict())))
    buffers = list(model.buffers())
    checkpoint(model, normal(4, 3, 6, 6, dtype=torch.float32).requires_grad_(), use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert_same(dict(seen[1]), dict(seen[0]), rtol=0, atol=0)
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_evaluation_and_layers_without_statistics():
    model = fastbn.checkpoint_safe(net(track_running_stats=False))
    actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert_same(actual, expected(lambda: net(track_running_stats=False)), rtol=0, atol=0)
    model = fastbn.checkpoint_safe(net().eval())
    actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert_same(actual, expected(lambda: net().eval()), rtol=0, atol=0)


# torch.compile: a checkpoint around a compiled model runs its graph again, one inside is a part of the graph.


def _compiled(model, where, mode, backend):
    if where == "around":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        return lambda x: checkpoint(compiled, x, **MODES[mode])
    return torch.compile(lambda x: checkpoint(model, x, **MODES[mode]), backend=backend, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", ["fastbn", "fastbn, cumulative", "fastbn with relu", "torch"])
def test_compiled(name, where, mode):
    """torch's own layer with momentum=None does not compile in one graph."""
    model = fastbn.checkpoint_safe(LAYERS[name]())
    actual = steps(model, _compiled(model, where, mode, "aot_eager"))
    assert_same(actual, expected(LAYERS[name]), **OTHER_ORDER)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["non-reentrant", "selective"])
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", ["fastbn", "torch"])
def test_compiled_by_inductor(name, where, mode):
    model = fastbn.checkpoint_safe(LAYERS[name]())
    actual = steps(model, _compiled(model, where, mode, "inductor"))
    assert_same(actual, expected(LAYERS[name]), **OTHER_ORDER)


def test_a_compiled_model_is_one_graph():
    counter, model = CompileCounter(), fastbn.checkpoint_safe(net())
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_same(steps(model, compiled), expected(net))
    assert counter.frame_count == 1


# Fusion by convert.


class Residual(nn.Module):
    """A block whose forward is traced: an activation, and an addition followed by one."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.relu = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.relu(self.bn2(self.relu(self.bn1(self.conv(x)))) + x)


def blocks(**options):
    torch.manual_seed(0)
    return nn.Sequential(Residual(), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, **options), nn.SiLU())


FUSED = ["relu", "add+relu", "silu"]
ORDERS = {
    "convert first": lambda model: fastbn.checkpoint_safe(fastbn.convert(model)),
    "convert last": lambda model: fastbn.convert(fastbn.checkpoint_safe(model)),
    "by convert": lambda model: fastbn.convert(model, checkpoint_safe=True),
    "converted twice": lambda model: fastbn.convert(fastbn.convert(model, checkpoint_safe=True)),
}


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=["", "cumulative"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_fusion_stays(order, mode, options):
    """In the first forward and in its repetition."""
    model = ORDERS[order](blocks(**options))
    with recorded_calls() as calls, set_checkpoint_early_stop(False):
        actual = steps(model, lambda x: checkpoint(model, x, **MODES[mode]), 1)
    assert calls == FUSED * 2
    assert_same(actual, expected(lambda: fastbn.convert(blocks(**options)), 1), rtol=0, atol=0)
    with recorded_calls() as calls:
        model.eval()(normal(4, 3, 6, 6, dtype=torch.float32))
    assert calls == FUSED


def test_what_is_not_fused_moves_statistics_once_too():
    """An addition that is fused without the activation after it, and an addition that broadcasts."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.bn1, self.bn2, self.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.GELU("tanh")

        def forward(self, x):
            y = self.act(self.bn1(x) + x)
            return self.act(self.bn2(y) + x.mean((2, 3), keepdim=True))

    model = fastbn.convert(Block(), checkpoint_safe=True)
    with recorded_calls() as calls, set_checkpoint_early_stop(False):
        actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert calls == ["add", ""] * 4
    assert_same(actual, expected(lambda: fastbn.convert(Block())), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_compiled_models_that_are_fused(where, mode, backend):
    model = fastbn.convert(blocks(), checkpoint_safe=True)
    actual = steps(model, _compiled(model, where, mode, backend))
    assert_same(actual, expected(blocks), **OTHER_ORDER)


def test_a_compiled_model_that_is_fused_has_no_activation_beside_the_ops():
    graphs = []
    compiled = torch.compile(
        fastbn.convert(blocks(), checkpoint_safe=True),
        backend=lambda graph, inputs: graphs.append(graph) or graph,
        fullgraph=True,
    )
    compiled(normal(4, 3, 6, 6, dtype=torch.float32))
    functions = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1 and sum("autograd_function_apply" in name for name in functions) == 3, functions
    assert not any(word in name for name in functions for word in ("relu", "silu", "<built-in function add>"))


class NormAct(nn.BatchNorm2d):
    """A layer of another library, with its activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def norm_act():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), NormAct(3))


@pytest.mark.parametrize("order", ORDERS)
def test_layers_of_other_libraries(order, monkeypatch):
    known = layers.Layer(_trained, lambda module: (module.act,))
    monkeypatch.setitem(layers.LAYERS, NormAct, known)
    model = ORDERS[order](norm_act())
    assert fastbn.transforms.report(model).layers[0].outcome == "fused with relu"
    for model in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with recorded_calls() as calls, set_checkpoint_early_stop(False):
            actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
        assert calls == ["relu"] * 4
        assert_same(actual, expected(norm_act), **OTHER_ORDER)
    assert [type(m) for m in fastbn.revert(model)] == [nn.Conv2d, NormAct]


@pytest.mark.parametrize("mode", MODES)
def test_outputs_that_are_kept(mode, monkeypatch):
    """A recomputation asks for the layer that it is of, whose answer is known, and saves what the forward saves."""
    asked = []
    save_of = saving.save_of
    monkeypatch.setattr(saving, "save_of", lambda layer, *args: asked.append(layer) or save_of(layer, *args))

    def make():
        model = fastbn.convert(blocks(), save="output")
        model[3] = nn.LeakyReLU(0.2)
        return model

    model = fastbn.checkpoint_safe(make())
    actual = steps(model, lambda x: checkpoint(model, x, **MODES[mode]), 1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(asked) >= len(norms) + 1 and all(layer in norms for layer in asked)
    assert_same(actual, expected(make, 1), rtol=0, atol=0)


def test_reports_say_of_marked_layers_what_they_say_of_others():
    plain, marked = fastbn.convert(blocks()), fastbn.convert(blocks(), checkpoint_safe=True)
    assert str(fastbn.transforms.report(marked)) == str(fastbn.transforms.report(plain))
    stock = fastbn.checkpoint_safe(blocks())
    assert fastbn.transforms.report(stock).layers[0].reason == "not converted"


def test_reverting_takes_the_mark_away():
    model = fastbn.convert(blocks(), checkpoint_safe=True)
    types = [type(m) for m in model.modules()]
    with fastbn.reverted(model):
        assert [type(m) for m in model.modules()] == [type(m) for m in blocks().modules()]
    assert [type(m) for m in model.modules()] == types
    assert [type(m) for m in fastbn.revert(model).modules()] == [type(m) for m in blocks().modules()]


def test_convert_changes_nothing_where_a_layer_cannot_be_marked():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), fastbn.BatchRenorm2d(3))
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="^checkpoint_safe: expected layers that normalise by the batch alone"):
        fastbn.convert(model, checkpoint_safe=True)
    assert [type(m) for m in model.modules()] == types


def test_marked_layers_take_the_short_way_to_their_tensors(monkeypatch):
    """nn.Module.__getattr__ takes 0.6 us per tensor."""
    model = fastbn.checkpoint_safe(fastbn.BatchNorm2d(3))
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: pytest.fail(f"{name} was asked for"))
    model(normal(4, 3, 6, 6, dtype=torch.float32))


# What a marked model keeps.


def test_classes_change_and_change_back():
    model = nn.Sequential(net(), net(nn.BatchNorm2d), nn.LayerNorm(2), fastbn.FrozenBatchNorm2d(3))
    types = [type(m) for m in model.modules()]
    state, buffers = list(model.state_dict()), list(model.buffers())
    assert fastbn.checkpoint_safe(model) is model
    safe = [type(m) for m in model.modules()]
    assert sum(a is not b for a, b in zip(types, safe, strict=True)) == 4
    assert all(issubclass(a, b) for a, b in zip(safe, types, strict=True))
    assert [type(m) for m in fastbn.checkpoint_safe(model).modules()] == safe
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert fastbn.checkpoint_safe(model, enabled=False) is model
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, fastbn.BatchNorm2d])
def test_copies(norm, copied):
    model = copied(fastbn.checkpoint_safe(net(norm)))
    assert type(model[1]) is type(fastbn.checkpoint_safe(net(norm))[1])
    actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert_same(actual, expected(lambda: net(norm)), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused(copied):
    model = copied(fastbn.convert(blocks(), checkpoint_safe=True))
    with recorded_calls() as calls:
        actual = steps(model, lambda x: checkpoint(model, x, use_reentrant=True))
    assert calls == FUSED * 4
    assert_same(actual, expected(lambda: fastbn.convert(blocks())), rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, fastbn.BatchNorm2d])
def test_tools_see_through_it(norm):
    model, x = fastbn.checkpoint_safe(net(norm)).eval(), normal(4, 3, 6, 6, dtype=torch.float32)
    for follower in (fx.symbolic_trace(model), torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(follower(x), model(x))
    graph = torch.export.export(model.train(), (x,)).graph
    assert not any("is_in_backward" in str(node.target) for node in graph.nodes)


def test_it_can_be_frozen():
    model = fastbn.checkpoint_safe(net())
    safe = type(model[1])
    fastbn.freeze(model)
    assert type(model[1]) is fastbn.FrozenBatchNorm2d
    fastbn.unfreeze(model)
    assert type(model[1]) is safe


def test_data_parallel_gets_copies():
    """Replicas are made of the attributes of a module and its class."""
    model = fastbn.checkpoint_safe(net())
    twin = model[1]._replicate_for_data_parallel()
    assert type(twin) is type(model[1])


@pytest.mark.parametrize(
    "layer",
    [fastbn.BatchRenorm2d(3), fastbn.AccumulatedBatchNorm2d(3), nn.LazyBatchNorm2d()],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_are_refused(layer):
    model = nn.Sequential(fastbn.BatchNorm2d(3), layer)
    message = f"^checkpoint_safe: expected layers that normalise by the batch alone, got {type(layer).__name__} at 1$"
    with pytest.raises(ValueError, match=message):
        fastbn.checkpoint_safe(model)
    assert type(model[0]) is fastbn.BatchNorm2d


def test_only_modules():
    with pytest.raises(TypeError, match="checkpoint_safe: expected a torch.nn.Module, got dict"):
        fastbn.checkpoint_safe({})


def test_a_forward_after_a_backward_moves_them_again():
    model = fastbn.checkpoint_safe(net())
    steps(model, model, 3)
    assert model[1].num_batches_tracked == 3 and not _torch.is_in_backward()


class _CheckpointedBlocks(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.blocks, self.mode = fastbn.convert(net(), checkpoint_safe=True), mode

    def forward(self, x):
        return checkpoint(self.blocks, x, **MODES[self.mode])


def _train(rank, port, mode, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = _CheckpointedBlocks(mode)
        actual = steps(model.blocks, nn.parallel.DistributedDataParallel(model))
        results[rank] = {name: t.tolist() for name, t in actual.items()}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_distributed_data_parallel(mode):
    """Both ranks see the same batches, so that averaged gradients and broadcast buffers are those of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_train, (port, mode, results), nprocs=2)
        ranks = [results[rank] for rank in range(2)]
    for rank in ranks:
        actual = {name: torch.tensor(value) for name, value in rank.items()}
        assert actual["1.num_batches_tracked"] == 2
        assert_same(actual, expected(net), rtol=1e-5, atol=1e-6)
