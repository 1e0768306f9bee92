"""fastbn.backends.crossings: which calls on a CPU are left to torch for their size, and where the sizes are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench.crossings
import fastbn
from fastbn import functional
from fastbn.backends import aten, crossings, native, registry
from fastbn.ops.dispatch import Call

MEASURED = Path(__file__).parents[2] / "bench" / "crossings.json"
TABLES = {"compiled": crossings.COMPILED, "without node": crossings.WITHOUT_NODE}
TABLE = {"train": {torch.float32: 1000}, "train, fused": {torch.float32: 500}, "train_backward": {torch.float32: 2000}}


@pytest.fixture
def without_node(monkeypatch):
    monkeypatch.setattr(functional, "NODE", None)
    monkeypatch.setattr(crossings, "NODE", None)
    monkeypatch.setattr(crossings, "WITHOUT_NODE", TABLE)


def _call(elements, **changed):
    call = Call(torch.zeros(elements // 8, 8), None, None, None, None, None, None, 0.1, 1e-5, 0, True)
    return call._replace(**changed)


@pytest.mark.parametrize("way", TABLES)
def test_the_tables_are_what_was_measured(way):
    assert TABLES[way] == bench.crossings.tables(json.loads(MEASURED.read_text())["records"], way)
    assert TABLES[way]
    name = {"compiled": "COMPILED", "without node": "WITHOUT_NODE"}[way]
    assert bench.crossings.source(name, TABLES[way]) in Path(crossings.__file__).read_text()


def test_small_calls_are_left_to_torch(without_node):
    backend, reason = registry.choose(_call(992))
    assert backend is aten.TORCH
    assert reason == "without the C++ node torch's operations are faster below 1000 elements (train, torch.float32)"
    assert registry.choose(_call(1000)) == (native.CPU, None)


def test_what_a_call_computes_decides(without_node):
    leaf = torch.zeros(8, requires_grad=True)
    backend_of = {
        "gradients": registry.choose(_call(1000, bias=leaf))[0],
        "activation": registry.choose(_call(600, activation=1))[0],
        "residual": registry.choose(_call(600, residual=torch.zeros(75, 8)))[0],
        "dtype": registry.choose(_call(8, input=torch.zeros(2, 8, dtype=torch.float64)))[0],
    }
    assert backend_of.pop("gradients") is aten.TORCH
    assert set(backend_of.values()) == {native.CPU}
    with torch.no_grad():
        assert registry.choose(_call(1000, bias=leaf))[0] is native.CPU


def test_a_named_backend_and_other_devices_are_not_asked_for_their_size(without_node):
    assert registry.choose(_call(16), "cpu")[0] is native.CPU
    assert "faster below" not in registry.choose(_call(8, input=torch.zeros(2, 8, device="meta")))[1]


def test_with_the_node_the_smallest_call_is_fast(monkeypatch):
    monkeypatch.setattr(crossings, "WITHOUT_NODE", TABLE)
    monkeypatch.setattr(crossings, "NODE", object())
    assert registry.choose(_call(16)) == (native.CPU, None)


def test_explain_and_a_call_agree(without_node):
    x = torch.randn(60, 8)
    plan = fastbn.explain(x)
    assert plan.backend == "torch" and "below 2000 elements (train_backward, torch.float32)" in plan.reason
    assert fastbn.explain(torch.randn(200, 8)).backend == "torch"
    assert fastbn.explain(torch.randn(300, 8)).backend == "cpu"
    assert fastbn.explain(torch.randn(200, 8), activation="relu").backend == "cpu"
    with torch.no_grad():
        assert fastbn.explain(torch.randn(200, 8)).backend == "cpu"
    assert fastbn.explain(x, backend="cpu").backend == "cpu"
    x.requires_grad_()
    assert "BatchNormFunction" not in type(functional.batch_norm(x, None, None, training=True).grad_fn).__name__
    assert (
        "BatchNormFunction" in type(functional.batch_norm(x, None, None, training=True, backend="cpu").grad_fn).__name__
    )


def _graphs(layer, *inputs, dynamic=False):
    """Return for each graph that a layer is compiled to whether it calls the ops or torch's batch_norm."""
    graphs = []

    def backend(graph, example_inputs):
        names = " ".join(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        assert ("autograd_function" in names) != ("batch_norm" in names)
        graphs.append("ops" if "autograd_function" in names else "torch")
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for x in inputs:
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    return graphs


def test_a_small_layer_is_compiled_to_torchs_operations(monkeypatch):
    monkeypatch.setattr(crossings, "COMPILED", TABLE)
    layer = fastbn.BatchNorm1d(8)
    assert _graphs(layer, torch.randn(100, 8)) == ["torch"]
    assert _graphs(layer, torch.randn(300, 8)) == ["ops"]


def test_a_cumulative_average_does_not_break_the_graph(monkeypatch):
    """torch's function takes it as a number, which is in the counter."""
    monkeypatch.setattr(crossings, "COMPILED", TABLE)
    assert _graphs(fastbn.BatchNorm1d(8, momentum=None), torch.randn(100, 8)) == ["ops"]
    layer = fastbn.BatchNorm1d(8, momentum=None, track_running_stats=False)
    assert _graphs(layer, torch.randn(100, 8)) == ["torch"]


def test_a_dynamic_size_gets_no_guard(monkeypatch):
    monkeypatch.setattr(crossings, "COMPILED", TABLE)
    layer = fastbn.BatchNorm1d(8)
    assert _graphs(layer, torch.randn(100, 8), torch.randn(300, 8), dynamic=True) == ["ops"]
