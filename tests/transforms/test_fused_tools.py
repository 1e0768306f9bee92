"""Models with fused forwards and the tools around them: copies, checkpoints, compilers, tracers, revert."""

import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.multiprocessing
from torch import nn

import fastbn
from fastbn.transforms.fuse.source import is_generated
from tests.packages import needs
from tests.transforms.fused import assert_same, inputs, random_state, recorded_calls, step
from tests.transforms.test_fuse import Block, ConvNorm, HiddenStates, Inverted, downsample

X = inputs(4, 3, 5, 5)
FUSED = ["relu", "add+relu", "relu", "", "add+relu", "silu", "add", "relu", "add+relu"]


def net():
    """Return a model with every kind of container that fuses."""
    return random_state(
        nn.Sequential(
            Block(),
            Block(downsample()),
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()),
            Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
            HiddenStates(nn.Identity()),
        )
    )


def fused_calls(model):
    with recorded_calls() as calls:
        model(X)
    return calls


def test_the_model_of_these_tests():
    assert fused_calls(fastbn.convert(net())) == FUSED


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(copied):
    model = fastbn.convert(net())
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert fused_calls(twin) == FUSED
    fastbn.revert(twin)
    assert any(is_generated(type(m)) for m in model.modules())
    assert not any(is_generated(type(m)) for m in twin.modules())


def test_saved_models(tmp_path):
    model = fastbn.convert(net()).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert fused_calls(loaded) == FUSED
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=0)


@pytest.mark.slow
def test_a_model_that_another_process_loads(tmp_path):
    model = fastbn.convert(net()).eval()
    torch.save((model, X, model(X)), tmp_path / "model.pt")
    code = f"""
import torch
from tests.transforms.test_fused_tools import FUSED, fused_calls
model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(x), y)
assert fused_calls(model) == FUSED
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pickled_model_whose_class_has_another_forward_now():
    model = fastbn.convert(net())[0]
    data = pickle.dumps(model)
    forward = Block.forward

    def changed(self, x):
        return self.conv1(x)

    Block.forward = changed
    try:
        loaded = pickle.loads(data)
        assert type(loaded) is Block
        torch.testing.assert_close(loaded(X), model.conv1(X))
    finally:
        Block.forward = forward


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def scale(self, x):
        return x * 2

    def forward(self, x):
        return torch.relu(self.bn(x)) * 2


@pytest.mark.parametrize("name", ["scale", "forward"])
def test_a_pickled_model_whose_class_has_other_numbers_now(name, monkeypatch):
    model = fastbn.convert(Scaled())
    data, same = pickle.dumps(model), pickle.loads(pickle.dumps(model))
    assert type(same) is type(model) is not Scaled
    method = getattr(Scaled, name)
    constants = tuple(3 if constant == 2 else constant for constant in method.__code__.co_consts)
    code = method.__code__.replace(co_consts=constants)
    monkeypatch.setattr(Scaled, name, types.FunctionType(code, globals()))
    assert type(pickle.loads(data)) is Scaled


def test_state_dicts_load_both_ways():
    stock, fast = net(), fastbn.convert(net())
    for source, target in [(stock, fast), (fast, stock)]:
        source.train()(X)
        target.load_state_dict(source.state_dict(), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        torch.testing.assert_close(target.eval()(X), source.eval()(X))


@needs("safetensors")
def test_safetensors(tmp_path):
    import safetensors.torch

    model = fastbn.convert(net()).eval()
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    other = fastbn.convert(net())
    nn.init.zeros_(other[0].conv1.weight)
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(other.eval()(X), model(X), rtol=0, atol=0)


def test_revert_restores_every_class_and_leaves_nothing():
    stock = net()
    types, attributes = [type(m) for m in stock.modules()], [set(vars(m)) for m in stock.modules()]
    model = copy.deepcopy(stock)
    modules = list(model.modules())
    fastbn.convert(model).train()(X)
    assert [type(m) for m in model.modules()] != types
    fastbn.revert(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [type(m) for m in model.modules()] == types
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_reverted_gives_the_stock_model_for_the_duration():
    model = fastbn.convert(net())
    types = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="within"):
        with fastbn.reverted(model) as stock:
            assert stock is model and fused_calls(model) == []
            assert not any(type(m).__module__.startswith("fastbn") for m in model.modules())
            model[3] = nn.Identity()
            raise RuntimeError("within")
    assert type(model[0]) is types[1] and type(model[3]) is nn.Identity
    assert fused_calls(model) == [call for call in FUSED if call != "add"]


def test_reverted_wants_a_module():
    with pytest.raises(TypeError, match="reverted: expected a torch.nn.Module, got int"):
        with fastbn.reverted(3):
            pass


def test_symbolic_tracing_of_the_whole_model():
    model = fastbn.convert(net()).eval()
    graph = torch.fx.symbolic_trace(model)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert {"0.bn1", "0.relu", "1.downsample.1", "4.layer.1.bn"} <= set(targets)
    torch.testing.assert_close(graph(X), model(X))


def test_tracing_sees_every_module():
    model = fastbn.convert(net()).eval()
    with recorded_calls() as calls:
        traced = torch.jit.trace(model, X, check_trace=False)
    assert set(calls) == {""}
    torch.testing.assert_close(traced(X), model(X))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = fastbn.convert(net()).eval()
    exported = torch.export.export(model, (X,), strict=strict)
    assert not any("fastbn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(X), model(X))


def test_functorch():
    model = fastbn.convert(net()).eval()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, X).sum()

    torch.testing.assert_close(
        torch.func.grad(loss)(parameters),
        dict(zip(parameters, torch.autograd.grad(model(X).sum(), model.parameters()))),
    )


def test_saved_tensors_hooks_and_checkpointing():
    model, twin = fastbn.convert(net()), net()
    for m in (model, twin):
        original = m.forward
        m.forward = lambda x, original=original: torch.utils.checkpoint.checkpoint(original, x, use_reentrant=False)
    assert_same(step(model, X), step(twin, X), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiled_models_are_one_graph(training):
    from torch._dynamo.testing import CompileCounter

    counts = {}
    for name, model in [("stock", net()), ("fused", fastbn.convert(net()))]:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model.train(training), backend=counter, fullgraph=True)
        frames = []
        for batch in (4, 4, 6, 9):
            x = inputs(batch, 3, 5, 5)
            torch.testing.assert_close(
                compiled(x), copy.deepcopy(model)(x), rtol=1e-9, atol=1e-9, msg=name
            ) if not training else compiled(x)
            frames.append(counter.frame_count)
        counts[name] = frames
    assert counts["fused"] == counts["stock"]


@pytest.mark.slow
def test_compiled_blocks_recompile_no_more_than_stock():
    from torch._dynamo.testing import CompileCounter

    counts = {}
    for name, change in [("stock", lambda m: m), ("fused", fastbn.convert)]:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = change(random_state(nn.Sequential(*[Block() for _ in range(4)], Block(downsample()))))
        for block in model:
            block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
        model(X), model(X)
        counts[name] = counter.frame_count
    assert counts["fused"] <= counts["stock"]


def test_data_parallel_replicas():
    model = fastbn.convert(net()).eval()
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)


def test_verbose_prints_the_report(capsys):
    fastbn.convert(net(), verbose=True)
    printed = capsys.readouterr().out
    assert printed.startswith("9 layers: 8 fused, 1 converted, 0 left\n")
    assert "fused with addition and relu (0.bn2, 1.downsample.1, 4.layer.1.bn)" in printed


def test_the_root_may_be_any_of_them():
    for root in (
        nn.BatchNorm2d(3),
        Block(),
        ConvNorm(activation=nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
    ):
        stock = type(root)
        assert fastbn.convert(root.double()) is root
        root(X)
        assert type(fastbn.revert(root)) is stock


@needs("torchvision")
def test_scripting_layers_of_other_libraries():
    from torchvision.ops import misc

    blocks = nn.Sequential(nn.Conv2d(3, 3, 1), misc.FrozenBatchNorm2d(3), nn.ReLU())
    model = fastbn.convert(random_state(blocks)).eval()
    modules = [(m, type(m)) for m in model.modules()]
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(X), model(X))
    assert [(m, type(m)) for m in model.modules()] == modules


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("marked", [False, True], ids=["", "checkpoint-safe"])
@pytest.mark.parametrize("training", [True, False])
def test_scripting_takes_the_modules_own_forward(training, marked):
    """It compiles that, and leaves every module of the model where and what it was."""
    # Of these only the two inner ones are fused.
    model = nn.Sequential(Block(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.Conv2d(3, 3, 1))
    model = random_state(model).train(training)
    twin = copy.deepcopy(model)
    fastbn.convert(model, checkpoint_safe=marked)
    modules = [(m, type(m)) for m in model.modules()]
    scripted = torch.jit.script(model)
    assert [(m, type(m)) for m in model.modules()] == modules and not is_generated(type(model))
    kinds = [node.kind() for node in scripted.inlined_graph.nodes()]
    assert kinds.count("aten::batch_norm") == 3 and kinds.count("aten::relu") + kinds.count("aten::relu_") == 3
    assert_same(step(scripted, X), step(twin, X), rtol=1e-9, atol=1e-9)
    with recorded_calls() as calls:
        model(X)
    assert calls == ["relu", "add+relu", "relu"]


@pytest.mark.slow
def test_a_compiled_training_step():
    model, twin = fastbn.convert(net()), net()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X).sum().backward(), twin(X).sum().backward()
    for (name, fast), stock in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(fast.grad, stock.grad, rtol=1e-8, atol=1e-8, msg=name)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-9, atol=1e-9)
