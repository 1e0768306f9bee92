"""bench.crossings: what a crossing is, and that both ways of a call run."""

from __future__ import annotations

import pytest
import torch

from bench import crossings
from fastbn import functional
from fastbn.backends import aten
from fastbn.backends import crossings as tables
from fastbn.ops.contract import DTYPES


@pytest.mark.parametrize(
    "speedups,expected",
    [
        ([{1024: 0.7, 2048: 0.9, 4096: 1.1}], 4096),
        ([{1024: 0.7, 2048: 0.9, 4096: 1.1}, {1024: 0.8, 2048: 1.2, 4096: 1.3}], 2048),
        ([{1024: 1.1, 2048: 0.9, 4096: 1.1}], 4096),
        ([{1024: 0.9, 2048: 0.9, 4096: 0.9}], 4096),
        ([{1024: 1.0, 2048: 1.2, 4096: 1.1}], 0),
    ],
)
def test_a_crossing_is_where_torch_is_no_longer_faster_in_every_format(speedups, expected):
    assert crossings.crossing(speedups) == expected


def test_tables_keep_each_way_and_leave_out_operations_without_a_crossing():
    def record(way, dtype, elements, speedup):
        return {
            "way": way,
            "operation": "eval",
            "dtype": str(dtype),
            "layout": "contiguous",
            "elements": elements,
            "speedup": speedup,
        }

    records = [
        record("without node", torch.float32, 1024, 0.5),
        record("without node", torch.float32, 2048, 1.5),
        record("without node", torch.float64, 1024, 1.5),
        record("compiled", torch.float32, 1024, 1.5),
    ]
    assert crossings.tables(records, "without node") == {"eval": dict(zip(DTYPES, (2048, 0, 0, 0), strict=True))}
    assert crossings.tables(records, "compiled") == {}


@pytest.mark.parametrize("elements", crossings.SIZES)
def test_shapes_have_that_many_elements(elements):
    assert torch.Size(crossings.shape_of(elements)).numel() == elements


@pytest.mark.parametrize("operation", crossings.OPERATIONS)
@pytest.mark.parametrize("table", [crossings.BY_OPS, crossings.BY_TORCH], ids=["ops", "torch"])
def test_a_call_takes_its_way(operation, table, monkeypatch):
    monkeypatch.setattr(functional, "NODE", None)
    monkeypatch.setattr(tables, "NODE", None)
    taken = []
    by_torch = aten.batch_norm
    monkeypatch.setattr(aten, "batch_norm", lambda call: taken.append("torch") or by_torch(call))
    crossings.call_of(operation, DTYPES[0], "channels_last", 1024, False, table)
    assert taken == ["torch"] * (table is crossings.BY_TORCH)
