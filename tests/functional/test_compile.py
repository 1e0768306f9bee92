"""torch.compile: no graph break, fastbn's ops in both graphs, the same numbers as eager."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func

import fastbn
from tests.stock import SHAPES, assert_same, assert_same_buffers, normal, pair


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are and records the ops that they call."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.backend = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    @staticmethod
    def _keep(names):
        def compiler(graph, inputs):
            for node in graph.graph.nodes:
                if node.op == "call_function":
                    # Ops that change buffers are arguments of a higher-order op.
                    names.extend(str(f) for f in (node.target, *node.args[:1]) if hasattr(f, "_schema"))
            return make_boxed_func(graph.forward)

        return compiler


def _step(module, x, *residual):
    x = x.detach().clone().requires_grad_()
    output = module(x, *residual)
    output.square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"output": output.detach(), "x": x.grad, **{n.removeprefix("_orig_mod."): g for n, g in grads.items()}}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_is_eager(backend, training, momentum):
    """momentum=None compiles too; torch's own module breaks the graph there."""
    _, eager = pair(momentum=momentum)
    _, compiled = pair(momentum=momentum)
    eager.train(training), compiled.train(training)
    step = torch.compile(compiled, backend=backend, fullgraph=True)
    for seed in range(3):
        x = normal(*SHAPES[2], seed=seed)
        assert_same(_step(step, x), _step(eager, x), rtol=0, atol=0)
        assert_same_buffers(compiled, eager, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@torch._inductor.config.patch(force_disable_caches=True)  # its keys know an op's name, not what shapes it returns
def test_inductor(memory_format, activation):
    """The layer has neighbours to fuse with, a residual and a mask."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = pair(dtype=torch.float32)[1]
            self.bn.activation = activation

        def forward(self, x, residual):
            return self.bn(x * 2 + 1, residual).sigmoid()

    eager, compiled = Block(), Block()
    step = torch.compile(compiled, fullgraph=True)
    for seed in range(2):
        tensors = [normal(*SHAPES[2], seed=seed + k, dtype=torch.float32) for k in (0, 9)]
        x, residual = (t.contiguous(memory_format=memory_format) for t in tensors)
        assert_same(_step(step, x, residual), _step(eager, x, residual))
        assert_same_buffers(compiled, eager)


@pytest.mark.parametrize("dynamic", [None, True])
def test_breaks_and_recompiles(dynamic):
    _, fast = pair()
    counter = CompileCounter()
    step = torch.compile(fast, backend=counter, dynamic=dynamic)
    for batch in (3, 3, 3):
        step(normal(batch, *SHAPES[2][1:])).sum().backward()
    assert counter.frame_count == 1
    for batch in (4, 5, 7):
        step(normal(batch, *SHAPES[2][1:])).sum().backward()
    assert counter.frame_count == (1 if dynamic else 2)
    assert torch._dynamo.explain(fast)(normal(*SHAPES[2])).graph_break_count == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
def test_graphs_hold_the_ops(residual, training):
    """They hold neither torch's batch_norm nor its decomposition."""
    _, fast = pair()
    fast.train(training).activation = "relu"
    graphs = Graphs()
    x, *added = normal(*SHAPES[2]), *([normal(*SHAPES[2], seed=1)] if residual else [])
    _step(torch.compile(fast, backend=graphs.backend, fullgraph=True), x, *added)
    forward = [name for name in graphs.forward if name.startswith("fastbn")]
    assert forward == ["fastbn.batch_norm_train.default" if training else "fastbn.batch_norm_frozen.default"]
    assert [name for name in graphs.backward if name.startswith("fastbn")] == ["fastbn.batch_norm_backward.default"]
    elsewhere = ("batch_norm_legit", "native_batch_norm", "var_mean", "rsqrt", "relu", "threshold")
    for name in graphs.forward + graphs.backward:
        assert not any(word in name for word in elsewhere), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_takes_the_gradient_in_the_format_of_the_input(activation, training):
    """Dynamo makes gradients contiguous for a Function whose backward asks for strides."""
    graphs = Graphs()
    layer = fastbn.BatchNorm2d(3, activation=activation).train(training)
    x = normal(2, 3, 4, 5, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    output = torch.compile(layer, backend=graphs.backend, fullgraph=True)(x)
    output.backward(torch.ones_like(output))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert "fastbn.batch_norm_backward.default" in graphs.backward
    assert not [op for op in graphs.backward if "clone" in op or "copy" in op]


def test_training_without_gradients():
    _, eager = pair()
    _, compiled = pair()
    graphs = Graphs()
    with torch.no_grad():
        x = normal(*SHAPES[2])
        torch.testing.assert_close(torch.compile(compiled, backend=graphs.backend, fullgraph=True)(x), eager(x))
    ops = [name for name in graphs.forward if name.startswith("fastbn")]
    assert ops == ["fastbn.batch_norm_train.default"] and not graphs.backward
    assert_same_buffers(compiled, eager)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", [fastbn.BatchNorm2d, fastbn.FrozenBatchNorm2d])
def test_evaluation_without_gradients_is_left_to_the_compiler(kind, context):
    """Of torch's operations it makes what it likes: a convolution's weights, one loop with their neighbours."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = kind(5, activation="relu", dtype=torch.float64).requires_grad_(False).eval()

        def forward(self, x, residual):
            return self.bn(x, residual)

    block, graphs = Block(), Graphs()
    x, residual = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    with context():
        output = torch.compile(block, backend=graphs.backend, fullgraph=True)(x, residual)
        torch.testing.assert_close(output, block(x, residual))
    assert graphs.forward and not [name for name in graphs.forward if name.startswith("fastbn")]


@pytest.mark.slow
@torch._inductor.config.patch(freezing=True, force_disable_caches=True)
def test_inductor_folds_the_layer_into_a_convolution():
    stock, fast = pair(dtype=torch.float32)
    x = normal(2, 3, 8, 8, dtype=torch.float32)
    conv = nn.Conv2d(3, 5, 3)
    sources = []
    with torch.no_grad():
        for layer in (stock, fast):
            torch._dynamo.reset()
            model = nn.Sequential(conv, layer, nn.ReLU()).eval()
            output, source = torch._inductor.utils.run_and_get_code(torch.compile(model), x)
            torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)
            sources.append("".join(source))
    assert "fastbn" not in sources[1] and "rsqrt" not in sources[1] and len(sources[1]) == len(sources[0])


def _compilations(build, regional):
    """Return how many graphs dynamo has made after each step of a model of equal blocks."""
    torch._dynamo.reset()
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), build(4), nn.ReLU()) for _ in range(10)))
    counter, counts = CompileCounter(), []
    if regional:
        run = nn.Sequential(*(torch.compile(block, backend=counter, fullgraph=True) for block in blocks))
    else:
        run = torch.compile(blocks, backend=counter, fullgraph=True)
    for training, batch in ((True, 2), (True, 3), (True, 5), (False, 2), (False, 5)):
        blocks.train(training)
        run(torch.ones(batch, 4, 3, 3))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("regional", [True, False], ids=["block_by_block", "whole"])
def test_layers_and_batches_compile_as_often_as_torchs(regional):
    """No layer of a model is compiled for itself: not by the block, where all blocks share their code."""
    stock = _compilations(nn.BatchNorm2d, regional)
    assert _compilations(fastbn.BatchNorm2d, regional) == stock
    assert _compilations(lambda channels: fastbn.convert(nn.BatchNorm2d(channels)), regional) == stock
    # Once with and once without a gradient of the input, for a fixed and a variable batch, in either mode.
    assert max(stock) <= (6 if regional else 3)


def test_errors_of_compiled_calls_are_torchs():
    fast = fastbn.BatchNorm2d(5)
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        torch.compile(fast, backend="aot_eager")(torch.zeros(1, 5, 1, 1))
    assert fast.num_batches_tracked.item() == 0


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_inside_compiled_code(transform):
    """Dynamo traces them itself: the layer must choose torch's batch_norm there too. (jvp fails with torch's own.)"""
    stock, fast = pair()
    stock.eval(), fast.eval()
    x, v = normal(*SHAPES[2]), normal(*SHAPES[2], seed=1)
    results = []
    for module in (stock, fast):
        functions = {
            "grad": lambda x, v, module=module: torch.func.grad(lambda x: (module(x) * v).pow(2).sum())(x),
            "vmap": lambda x, v, module=module: torch.func.vmap(lambda t: module(t))(torch.stack([x, v])),
        }
        results.append(torch.compile(functions[transform], backend="aot_eager", fullgraph=True)(x, v))
    torch.testing.assert_close(results[1], results[0])
