"""The argument `save` of the layers: what is kept of a call, by the parameters as they are then."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastbn
from fastbn import _torch
from fastbn.autograd.from_output import MAX_SHIFT, MIN_WEIGHT
from fastbn.nn import saving
from tests.stock import normal

X = normal(4, 3, 5, 5, dtype=torch.float32).requires_grad_()


def keeps_output(layer, *residual):
    return "FromOutput" in type(layer(X, *residual).grad_fn).__name__


def layer_of(weight=1.0, bias=0.0, **options):
    layer = fastbn.BatchNorm2d(3, save="output", **options)
    with torch.no_grad():
        if layer.affine:
            layer.weight[1], layer.bias[1] = weight, bias
    return layer


@pytest.mark.parametrize(
    "weight, bias, expected",
    [
        (1.0, 0.0, True),
        (-0.5, 0.5 * MAX_SHIFT, True),
        (0.5, -0.5 * MAX_SHIFT * 1.01, False),
        (MIN_WEIGHT, 0.0, True),
        (MIN_WEIGHT * 0.99, 0.0, False),
        (0.0, 0.0, False),
        (float("nan"), 0.0, False),
        (1.0, float("inf"), False),
    ],
)
def test_parameters_decide(weight, bias, expected):
    assert keeps_output(layer_of(weight, bias)) == expected


def test_the_slope_counts():
    for weight, expected in ((MIN_WEIGHT, False), (101 * MIN_WEIGHT, True)):
        assert keeps_output(layer_of(weight, activation="leaky_relu")) == expected
    assert not keeps_output(layer_of(activation="leaky_relu", activation_param=-0.1))


def test_weights_do_not_matter_for_a_mask():
    layer, residual = layer_of(0.0, activation="relu"), normal(4, 3, 5, 5, dtype=torch.float32)
    assert keeps_output(layer, residual) and not keeps_output(layer)


def test_without_parameters():
    assert keeps_output(layer_of(affine=False))


def test_where_the_input_is_kept():
    layer = layer_of()
    with torch.no_grad():
        assert layer(X).grad_fn is None
    assert not keeps_output(fastbn.BatchNorm2d(3))
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), layer(X))


def test_a_step_is_that_of_other_layers():
    layers = layer_of(activation="leaky_relu"), fastbn.BatchNorm2d(3, activation="leaky_relu")
    results = []
    for layer in layers:
        x = X.detach().clone().requires_grad_()
        (layer(x) ** 2).sum().backward()
        results.append((x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()))
    torch.testing.assert_close(*results)


def test_text_copies_and_errors():
    layer = layer_of()
    assert repr(layer).endswith("save='output')") and "save" not in repr(fastbn.BatchNorm2d(3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert keeps_output(other)
    assert layer.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()
    with pytest.raises(ValueError, match='save: expected "input" or "output", got None'):
        fastbn.BatchNorm2d(3, save=None)


def test_convert_and_revert():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.1))
    with pytest.raises(ValueError, match="save"):
        fastbn.convert(model, save="no")
    assert type(model[1]) is nn.BatchNorm2d
    fastbn.convert(model, save="output")
    assert keeps_output(model)
    fastbn.convert(model)
    assert keeps_output(model)
    with fastbn.reverted(model):
        assert type(model[1]) is nn.BatchNorm2d and "save_for_backward" not in vars(model[1])
    assert keeps_output(model)
    fastbn.convert(model, save="input")
    assert not keeps_output(model)
    fastbn.convert(model, save="output")
    fastbn.revert(model)
    assert "save_for_backward" not in vars(model[1])


class Queue:
    """Answers as a GPU gives them: `arrive` lets the pending one be seen."""

    def __init__(self, monkeypatch):
        self.has_arrived, self.is_capturing, self.asked = False, False, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))

    def record(self):
        self.has_arrived = False

    def query(self):
        return self.has_arrived

    def ask(self, answer):
        def asked():
            self.asked += 1
            return torch.tensor(answer)

        return asked


def test_only_the_first_answer_of_a_gpu_is_waited_for(monkeypatch):
    gpu, answer = Queue(monkeypatch), saving.LateAnswer()
    assert answer.get(gpu.ask(True)) is True  # waited for
    assert answer.get(gpu.ask(False)) is True and gpu.asked == 2
    for _ in range(3):  # under way
        assert answer.get(gpu.ask(True)) is True
    assert gpu.asked == 2
    gpu.has_arrived = True
    assert answer.get(gpu.ask(True)) is False and gpu.asked == 2
    assert answer.get(gpu.ask(True)) is False and gpu.asked == 3
    gpu.has_arrived = True
    assert answer.get(gpu.ask(True)) is True


def test_a_recomputation_gets_the_answer_of_the_forward(monkeypatch):
    """Else it could save another tensor than the forward did."""
    gpu, answer = Queue(monkeypatch), saving.LateAnswer()
    answer.get(gpu.ask(True))
    answer.get(gpu.ask(False))
    gpu.has_arrived = True
    monkeypatch.setattr(_torch, "is_in_backward", lambda: True)
    assert answer.get(gpu.ask(False)) is True and gpu.asked == 2
    monkeypatch.setattr(_torch, "is_in_backward", lambda: False)
    assert answer.get(gpu.ask(False)) is False


def test_a_captured_graph_keeps_the_answer_that_is_known(monkeypatch):
    gpu = Queue(monkeypatch)
    gpu.is_capturing = True
    assert saving.LateAnswer().get(gpu.ask(True)) is False and not gpu.asked
    answer = saving.LateAnswer()
    gpu.is_capturing = False
    answer.get(gpu.ask(True))
    gpu.is_capturing = True
    assert answer.get(gpu.ask(False)) is True and gpu.asked == 1
