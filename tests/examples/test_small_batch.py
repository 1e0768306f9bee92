"""examples/small_batch: each method trains, and what is written says what was run."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from examples import small_batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [name for name in small_batch.METHODS if name not in ("LayerNorm", "none")])
def test_each_method_learns(data, name):
    """A guess is right in a tenth, which is what the net without normalisation is after as many images."""
    model = small_batch.train(data, small_batch.METHODS[name], 8, 2400, seed=0)
    assert not model.training
    assert small_batch.accuracy(model, data) > 0.5


def test_runs_start_from_the_same_weights_and_see_the_same_images(data):
    nets = []
    for name in ("BatchNorm", "LayerNorm"):
        torch.manual_seed(3)
        nets.append(small_batch.net(small_batch.METHODS[name], 8, 10))
    first, second = ([p for m in net if not hasattr(m, "eps") for p in m.parameters()] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_command_writes_a_table_and_a_picture(monkeypatch, tmp_path, capsys):
    command = ["small_batch", "--out", str(tmp_path), "--images", "64", "--batches", "4", "16", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "BatchNorm", "LayerNorm"])
    small_batch.main()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["accuracy"]
    assert list(results) == ["BatchNorm", "LayerNorm"]
    assert all(
        list(by_batch) == ["4", "16"] and all(len(runs) == 2 for runs in by_batch.values())
        for by_batch in results.values()
    )
    assert "| BatchNorm |" in capsys.readouterr().out


def test_the_page_has_the_results_that_are_kept():
    docs = Path(small_batch.__file__).parents[1] / "docs"
    results = json.loads((docs / "small_batch.json").read_text())["accuracy"]
    assert list(results) == list(small_batch.METHODS)
    page = (docs / "variants.md").read_text()
    for name, by_batch in results.items():
        row = " | ".join(f"{statistics.mean(runs):.1%}" for runs in by_batch.values())
        assert f"| {name} | {row} |" in page
