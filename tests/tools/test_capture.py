"""What makes a program of a model: exporters, tracers, compilers, transforms of functions."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import fx, nn

import fastbn
from tests.packages import needs
from tests.stock import assert_same
from tests.tools.models import images, layers, pair, step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*:Warning")


def _targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_script(training):
    stock, fast = (model.train(training) for model in pair())
    scripted = torch.jit.script(fast)
    assert all(type(layer) is fastbn.BatchNorm2d for layer in layers(fast))
    assert_same(step(scripted, images()), step(stock, images()))


def test_scripted_model_through_freeze_and_optimize_for_inference():
    stock, fast = (model.eval() for model in pair())
    frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.script(fast)))
    torch.testing.assert_close(frozen(images()), stock(images()))
    assert "batch_norm" not in str(torch.jit.freeze(torch.jit.script(fast)).graph)


def test_trace_of_a_model_with_an_activation(tmp_path):
    stock, fast = (model.eval() for model in pair())
    layers(fast)[0].activation = "relu"
    traced = torch.jit.trace(fast, images())
    traced.save(str(tmp_path / "model.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(images(2)), stock(images(2)))


def test_symbolic_trace_of_a_model():
    stock, fast = pair()
    graphs = [fx.symbolic_trace(model) for model in (stock, fast)]
    assert graphs[0].code == graphs[1].code
    assert_same(step(graphs[1], images()), step(graphs[0], images()))
    assert fastbn.convert(graphs[0]) is graphs[0] and type(layers(graphs[0])[0]) is fastbn.BatchNorm2d


def _gradients(layer, parameters, buffers, x):
    y = torch.func.functional_call(layer, (parameters, buffers), (x,)).relu()
    return torch.autograd.grad(y.square().sum(), (x, *parameters.values()))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_make_fx(training, mode):
    """Forward and backward are aten's operations."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = []
    for layer in (nn.BatchNorm2d(3), fastbn.BatchNorm2d(3, activation="relu")):
        layer.train(training)
        parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
        buffers = {name: b.clone() for name, b in layer.named_buffers()}

        gradients = functools.partial(_gradients, layer)
        x = images().requires_grad_()
        graph = make_fx(gradients, tracing_mode=mode)(parameters, copy.deepcopy(buffers), x)
        assert not any("fastbn" in name for name in _targets(graph.graph))
        assert sum("batch_norm_backward" in name for name in _targets(graph.graph)) == 1
        traced.append(graph(parameters, buffers, x))
    torch.testing.assert_close(traced[1], traced[0])


def test_aot_decompositions():
    from functorch.compile import aot_module, make_boxed_func
    from torch._decomp import core_aten_decompositions

    names = []

    def keep(graph, inputs):
        names.append(_targets(graph.graph))
        return make_boxed_func(graph.forward)

    stock, fast = pair()
    compiled = aot_module(copy.deepcopy(fast), keep, keep, decompositions=core_aten_decompositions())
    output = compiled(images())
    output.sum().backward()
    torch.testing.assert_close(output, stock(images()))
    assert len(names) == 2 and not any("fastbn" in name for graph in names for name in graph)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_and_decompositions_of_a_model(strict):
    stock, fast = (model.eval() for model in pair())
    programs = [torch.export.export(model, (images(),), strict=strict) for model in (stock, fast)]
    assert _targets(programs[0].graph) == _targets(programs[1].graph)
    stream = io.BytesIO()
    torch.export.save(programs[1], stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    torch.testing.assert_close(loaded.module()(images()), stock(images()))
    assert not any("fastbn" in name for name in _targets(loaded.run_decompositions().graph))


@pytest.mark.slow
@needs("onnx")
@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, id="dynamo", marks=needs("onnxscript")), pytest.param(False, id="torchscript")]
)
def test_onnx(dynamo):
    import onnx
    from onnx.reference import ReferenceEvaluator

    stock, fast = (model.eval() for model in pair())
    layers(fast)[0].activation = "relu"
    kinds = []
    for model in (stock, fast):
        stream = io.BytesIO()
        if dynamo:
            torch.onnx.export(model, (images(),), dynamo=True, verbose=False).save(stream)
        else:
            # By default that exporter folds BatchNorm into the convolutions.
            torch.onnx.export(model, (images(),), stream, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE)
        program = onnx.load_from_string(stream.getvalue())
        kinds.append({node.op_type for node in program.graph.node})
        name = program.graph.input[0].name
        (actual,) = ReferenceEvaluator(program).run(None, {name: images().numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), stock(images()), rtol=1e-3, atol=1e-4)
    assert kinds[1] == kinds[0]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_of_a_model(training):
    torch._dynamo.reset()
    stock, fast = (model.train(training) for model in pair())
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 4, 6):
        actual = step(compiled, images(count))
        actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
        # A compiled evaluation is torch's decomposed batch_norm, whose roundings gradients of convolutions sum.
        tolerance = {} if training else {"rtol": 5e-5, "atol": 1e-5}
        assert_same(actual, step(stock, images(count)), **tolerance)


def test_transforms_of_functions_of_a_model():
    gradients = []
    for model in pair():
        model.eval()
        parameters = dict(model.named_parameters())

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        gradients.append(torch.vmap(torch.func.grad(loss), (None, 0))(parameters, images()))
    assert_same(gradients[1], gradients[0])


def test_gradcheck():
    layer = fastbn.BatchNorm2d(3, activation="silu", dtype=torch.float64)
    x = images(2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x), x)
    frozen = fastbn.freeze(layer)
    assert torch.autograd.gradcheck(lambda x: frozen(x), x)


@needs("torchvision")
def test_feature_extractor():
    from torchvision.models import feature_extraction

    features = []
    for model in pair():
        extractor = feature_extraction.create_feature_extractor(model.eval(), {"0.bn1": "norm", "0": "block"})
        features.append(extractor(images()))
    assert set(features[0]) == {"norm", "block"}
    assert_same(features[1], features[0])


@needs("timm")
def test_feature_extraction_by_nodes_of_timm():
    from timm.models._features_fx import GraphExtractNet

    extracted = []
    for model in pair():
        extracted.append(GraphExtractNet(model.eval(), ["0.bn1"])(images()))
    torch.testing.assert_close(extracted[1], extracted[0])
