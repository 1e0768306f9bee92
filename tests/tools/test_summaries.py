"""What counts and prints: operations, parameters, shapes."""

from __future__ import annotations

import io
import re

import pytest
from torch import nn

import fastbn
from tests.packages import needs
from tests.tools.models import images, pair


@needs("thop")
def test_thop():
    """It knows layers by their exact type, and is told of fastbn's."""
    import thop

    fastbn.register_with_tools()
    counts = [thop.profile(model.eval(), (images(),), verbose=False) for model in pair()]
    assert counts[0] == counts[1]
    bare = [
        thop.profile(layer(4).eval(), (images(4, 2)[:, :1].repeat(1, 4, 1, 1),), verbose=False)[0]
        for layer in (nn.BatchNorm2d, fastbn.BatchNorm2d)
    ]
    assert bare[0] == bare[1] > 0


@needs("fvcore")
@pytest.mark.filterwarnings("ignore")
def test_fvcore():
    import fvcore.nn

    counts = [fvcore.nn.FlopCountAnalysis(model.eval(), images()).by_operator() for model in pair()]
    assert counts[0] == counts[1] and counts[0]["batch_norm"] > 0


@needs("ptflops")
def test_ptflops():
    import ptflops

    fastbn.register_with_tools()
    counts = []
    for backend in ("pytorch", "aten"):
        for model in pair():
            options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
            counts.append(ptflops.get_model_complexity_info(model.eval(), (3, 6, 6), **options))
    assert counts[0] == counts[1] and counts[2] == counts[3]


@needs("torchinfo")
def test_torchinfo():
    import torchinfo

    texts = []
    for model in pair():
        fast = model[0].bn1.__class__ is fastbn.BatchNorm2d
        if fast:
            model[0].bn1.activation = "relu"
        texts.append(str(torchinfo.summary(model, input_data=images(), verbose=0, depth=4)))
    assert "BatchNorm2d" in texts[0] and texts[0] == texts[1]


@needs("torchsummary")
def test_torchsummary(capsys):
    import torchsummary

    texts = []
    for model in pair():
        torchsummary.summary(model, (3, 6, 6), device="cpu")
        texts.append(capsys.readouterr().out)
    assert "BatchNorm2d-" in texts[0] and texts[0] == texts[1]


@needs("lightning")
def test_summary_of_lightning():
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.model_summary import ModelSummary

    texts = []
    for model in pair():
        module = LightningModule()
        module.model = model
        texts.append(str(ModelSummary(module, max_depth=-1)))
    assert texts[0] == texts[1]


def test_graph_of_autograd():
    """A walk of the graph, as drawing libraries do it, finds tensors among what the op saved."""
    _, fast = pair()
    seen, todo = set(), [fast(images()).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            assert all(tensor is not None for tensor in getattr(node, "saved_tensors", ()))
            todo += [following for following, _ in node.next_functions]
    assert sum(re.search("BatchNormFunction", node.name()) is not None for node in seen) == 2


def test_printed_models():
    printed = []
    for model in pair():
        stream = io.StringIO()
        print(model, file=stream)
        printed.append(stream.getvalue())
    assert printed[0] == printed[1]
