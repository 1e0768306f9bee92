"""bench.sync and bench.sync_model: what is compared agrees, and docs/scaling.md has their tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import distributed

from bench import sync, sync_model
from fastbn.nn.sync import Group

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()


def test_what_is_timed_agrees_before_it_is(tmp_path):
    distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        calls = sync.calls_of(5, Group(distributed.group.WORLD.group_name, 1, 0))
        assert {direction for direction, _ in calls} == {"forward", "backward"}
        ours, theirs = calls["backward", "fastbn"](), calls["backward", "torch's pattern"]()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.float(), b)
    finally:
        distributed.destroy_process_group()


def test_bytes():
    assert [sync.bytes_of(64, direction, "fastbn") for direction in ("forward", "backward")] == [1032, 1024]
    assert [sync.bytes_of(64, direction, "torch's pattern") for direction in ("forward", "backward")] == [516, 512]


def test_the_page_has_the_measured_times():
    results = json.loads((ROOT / "bench" / "sync.json").read_text())
    assert sync.table(results["records"]) in PAGE and results["note"]


def test_the_page_has_the_predictions():
    assert sync_model.table() in PAGE


def test_predictions_follow_their_formula():
    """8 GPUs: 7 steps within the node; 1024: 896 within and 127 between 128 nodes, or 14 each way and 2 x 7."""
    sent = 8 * (2 * 64 + 1)
    assert sync_model.gather(8, sent).total_us == pytest.approx(3.6 + 7 * 0.47 + 7 * sent / 75e3)
    assert sync_model.gather(1024, sent).total_us == pytest.approx(
        3.6 + 896 * 0.47 * 1.8 + 127 * 2.7 + 1023 * sent / 12.5e3
    )
    assert sync_model.add_up(1024, 1024).total_us == pytest.approx(4.4 + 14 * 0.52 * 1.8 + 14 * 5.0 + 2048 / 12.5e3)


@pytest.mark.slow
def test_two_processes_are_measured(monkeypatch):
    records = sync.measure(2)
    assert len(records) == 4 * len(sync.CHANNELS) and all(r["p20_us"] <= r["median_us"] <= r["p80_us"] for r in records)
