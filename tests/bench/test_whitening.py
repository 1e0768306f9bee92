"""bench.whitening, and the page that quotes it: its tables are those of the committed results, its examples run."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest
import torch

from bench import whitening
from fastbn.measure.timer import Budget

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "whitening.json"
PAGE = (ROOT / "docs" / "variants.md").read_text()


def test_the_tables_of_the_page_are_those_of_the_results():
    """`python -m bench.whitening --load bench/whitening.json` prints them."""
    results = json.loads(RESULTS.read_text())
    for name, table in whitening.tables(results).items():
        assert table in PAGE, name
    assert results["machine"]["name"] in PAGE
    assert (ROOT / "docs" / "whitening.png").stat().st_size < 100_000 and "(whitening.png)" in PAGE


def test_the_examples_of_the_page():
    section = re.search(r"^## Whitening\n.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[0]
    before = torch._tensor_str.PRINT_OPTS.precision, torch._tensor_str.PRINT_OPTS.sci_mode
    try:
        test = doctest.DocTestParser().get_doctest(section, {}, "variants.md", None, 0)
        assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) > 8
    finally:
        torch.set_printoptions(precision=before[0], sci_mode=before[1])


def test_a_source_has_its_covariance():
    source = whitening.Source.of(4)
    values = torch.linalg.eigvalsh(source.cov)
    torch.testing.assert_close(values.flip(0), 1 / torch.arange(1, 5, dtype=torch.float64))
    # The error of a covariance of n samples is some sqrt(2 / n) of it: 0.01.
    torch.testing.assert_close(torch.cov(source.draw(20_000).T), source.cov, rtol=0, atol=0.05)


def test_instability_of_known_outputs():
    same = torch.ones(5, 3).double()
    assert whitening.instability(same) == 0
    signs = torch.tensor([1.0, -1.0]).repeat(10)[:, None].expand(20, 3)
    assert whitening.instability(signs) == 1
    assert whitening.instability(1 + 0.5 * signs) == pytest.approx((0.25 / 1.25) ** 0.5)


def test_least_squares_of_known_signals():
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = torch.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
    assert whitening.unexplained(x, 3 * x + 1, channelwise=True) < 1e-12
    assert whitening.unexplained(x, features, channelwise=False) < 1e-12
    # Each feature has half of its variance from either channel, up to some 1 / sqrt(2000) that they are correlated.
    assert whitening.unexplained(x, features, channelwise=True) == pytest.approx(0.5, abs=0.05)


def test_a_brief_run(monkeypatch, tmp_path, capsys):
    for name, value in {
        "SHAPES": ((2, 4, 3, 3),),
        "GROUP_SIZES": (2, 4, 16),
        "BUDGET": Budget(seconds=0, warm_up_seconds=0, min_rounds=2, max_rounds=2),
        "CHANNELS": (4, 16),
        "ELEMENTS": (32, 128),
        "BATCHES": 4,
        "PROBES": 5,
    }.items():
        monkeypatch.setattr(whitening, name, value)
    path, picture, threads = tmp_path / "run.json", tmp_path / "run.png", torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["whitening", "--json", str(path), "--picture", str(picture)])
    try:
        whitening.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())
    assert [(each["group_size"], each["operation"]) for each in results["times"]] == [
        (size, operation) for size in (2, 4) for operation in ("train_backward", "eval")
    ]
    assert all(each[method] > 0 for each in results["times"] for method in whitening.METHODS)
    exact = [each["linear_layer"] for each in results["expressiveness"]]
    assert max(exact) < 1e-4 and picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(table in printed for table in whitening.tables(results).values())
