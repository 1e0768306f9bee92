"""bench.readme_chart, and what README and docs/performance.md quote: all of it is in the committed results."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import readme_chart
from bench.network_tables import by_network
from bench.results import Results, load
from bench.tables import FASTBN, factor, is_sweep

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
LAYER_TABLE = {
    "train": "training forward",
    "train_backward": "training forward + backward",
    "train_backward+relu": "the same with relu",
    "train_backward+add+relu": "the same with addition and relu",
    "train_backward+silu": "the same with silu",
    "eval": "evaluation",
    "eval+relu": "evaluation with relu",
}


@functools.cache
def _layers() -> Results:
    return load(readme_chart.LAYERS)


@functools.cache
def _networks() -> Results:
    return load(readme_chart.NETWORKS)


@functools.cache
def _shown() -> dict[str, Any]:
    return readme_chart.figures(_layers(), _networks())


def _words(text: str) -> str:
    """Return `text` on one line, for sentences may be wrapped anywhere."""
    return " ".join(text.split())


@pytest.mark.parametrize("theme", readme_chart.THEMES)
def test_the_committed_pictures_show_the_committed_results(theme):
    """`python -m bench.readme_chart` draws them."""
    path = ROOT / "docs" / f"readme_{theme}.svg"
    assert readme_chart.described(path) == _shown()
    lengths = _bar_lengths(path)
    means = {
        f"bar-{panel}-{row}-{dtype}": by_dtype[dtype]["mean"]
        for panel, shown in enumerate(_shown()["panels"])
        for row, by_dtype in enumerate(shown["rows"].values())
        for dtype in readme_chart.DTYPES
    }
    assert lengths.keys() == means.keys() and len(means) == 14
    scale = lengths["bar-0-0-float32"] / means["bar-0-0-float32"]
    # Coordinates have six digits.
    assert lengths == pytest.approx({name: scale * mean for name, mean in means.items()}, rel=1e-4)


def _bar_lengths(path: Path) -> dict[str, float]:
    lengths = {}
    for group in ET.parse(path).iter("{http://www.w3.org/2000/svg}g"):
        if group.get("id", "").startswith("bar-"):
            outline = group.find("{http://www.w3.org/2000/svg}path").get("d")
            across = [float(x) for x in re.findall(r"[ML] ([\d.]+) [\d.]+", outline)]
            lengths[group.get("id")] = max(across) - min(across)
    return lengths


def test_pictures_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert len(readme_chart.save(_shown(), tmp_path / name)) == len(readme_chart.THEMES)
    for theme in readme_chart.THEMES:
        first, second = ((tmp_path / name / f"readme_{theme}.svg").read_bytes() for name in ("a", "b"))
        assert first == second


def test_no_text_is_cut_off_or_on_top_of_another():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = readme_chart.draw(_shown(), "light")
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [*figure.texts, *figure.axes[0].texts]
    boxes = [text.get_window_extent(renderer) for text in texts]
    outside = [
        text.get_text()
        for text, box in zip(texts, boxes)
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    assert len(texts) > 30 and not outside
    for index, box in enumerate(boxes):
        # The boxes have room for accents above the letters.
        inner = box.shrunk(1, 0.7)
        assert not any(inner.overlaps(other.shrunk(1, 0.7)) for other in boxes[index + 1 :]), texts[index].get_text()


def test_readme_has_the_pictures_and_says_what_they_show():
    assert f'alt="{readme_chart.alternative(_shown())}"' in README
    assert all(f'"docs/readme_{theme}.svg"' in README for theme in readme_chart.THEMES)


def test_what_readme_says_of_the_results():
    text = _words(README)
    step = "train_backward+relu"
    eager, onednn, compiled = (
        readme_chart.layer_speedup(_layers(), step, "float32", rival) for rival in ("torch", "onednn", "compile")
    )
    alone = readme_chart.layer_speedup(_layers(), "train_backward", "float32", "compile")
    assert (
        f"takes torch eager {factor(eager['mean'])} times as long as fastbn ({eager['cases']} shapes), torch's oneDNN "
        f"tensors {factor(onednn['mean'])} times ({onednn['cases']} shapes), and torch.compile "
        f"{factor(compiled['mean'])} times ({compiled['cases']} shapes; {factor(alone['mean'])} times without the ReLU)"
    ) in text
    frozen = readme_chart.layer_speedup(_layers(), "frozen", "float32")
    slower = [s for op, dtype, s in _over_torch() if (op, dtype) == ("frozen", "float32") and s < 1]
    worst = factor(min(slower))
    assert f"slower than torch in {len(slower)} of {frozen['cases']} shapes (at worst {worst} times as fast)" in text
    training = [readme_chart.network_speedup(_networks(), "train_backward", dtype) for dtype in readme_chart.DTYPES]
    gains = [round(100 * (each["mean"] - 1)) for each in training]
    lost = round(100 * (1 - min(each["worst"] for each in training)))
    assert f"gained {gains[0]} to {gains[1]} % in training on average, and in the worst case lost {lost} %" in text


def test_every_slow_case_is_named():
    """README and docs/performance.md list all that is below 1, and no bfloat16 case is."""
    slow: dict[str, list[str]] = {}
    for op, dtype, over in _over_torch():
        if over < 1:
            assert dtype == "float32"
            slow.setdefault(op, []).append(factor(over))
    assert {op: len(cases) for op, cases in slow.items()} == {"train": 1, "train_backward": 1, "eval": 4, "frozen": 9}
    evaluated = sorted(slow["eval"])
    for text in map(_words, (README, PERFORMANCE)):
        assert f"channels_last ({slow['train'][0]})" in text and f"({slow['train_backward'][0]})" in text
        assert f"16x3x224x224 ({evaluated[0]}" in text or f"16x3x224x224 in evaluation ({evaluated[0]})" in text
        assert f"({evaluated[1]} to {evaluated[-1]})" in text
        assert f"({min(slow['frozen'])} to {max(slow['frozen'])} in nine cases)" in text


def _over_torch() -> list[tuple[str, str, float]]:
    ours = [m for m in _layers().measurements if m.implementation == FASTBN and not is_sweep(m.group)]
    return [(m.op, m.dtype, m.speedup_over["torch"]) for m in ours]


def test_the_table_of_layers():
    runs = _layers(), load(ROOT / "bench" / "results" / "cpu-avx2.json")
    for op, label in LAYER_TABLE.items():
        cells = []
        for results in runs:
            for dtype in readme_chart.DTYPES:
                over = readme_chart.layer_speedup(results, op, dtype)
                cells.append(f"{factor(over['mean'])} ({factor(over['worst'])} to {factor(over['best'])})")
        assert f"| {label} | {' | '.join(cells)} |" in PERFORMANCE


def test_the_table_of_networks():
    rows = by_network(_networks()).rows
    section = PERFORMANCE.split("## Whole networks on a CPU")[1].split("\n## ")[0]
    listed = [line.split(" | ", 1)[1] for line in section.splitlines() if line.startswith("| ") and "(" in line]
    assert listed == [f"{' | '.join(cells)} |" for _, *cells in rows]
