"""The command `python -m bench.readme_chart`: the chart at the head of README, from committed results.

A bar is how many times as fast as torch fastbn was, as a geometric mean over cases, and the number in brackets is the
case in which it did worst. The numbers are in the picture's metadata too, and so a test can hold it to the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.network_models import FUSED, TORCH
from bench.results import Measurement, NetworkStep, Results, load
from bench.tables import FASTBN, STOCK, factor, is_sweep
from fastbn.cli.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
LAYERS, NETWORKS = (ROOT / "bench" / "results" / name for name in ("cpu.json", "networks.json"))
# What a row is called, by its op.
LAYER_ROWS = {
    "train_backward": "training",
    "train_backward+relu": "training, + ReLU",
    "train_backward+add+relu": "training, + add + ReLU",
    "eval": "evaluation",
    "eval+relu": "evaluation, + ReLU",
}
NETWORK_ROWS = {"train_backward": "training", "eval": "evaluation"}
DTYPES = ("float32", "bfloat16")
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
# Colours of fastbn and torch as in bench/plots.py, and a lighter one of the same hue, on GitHub's two backgrounds.
THEMES = {
    "light": {"text": "#1F2328", "faint": "#59636E", "torch": "#0072B2", "float32": "#D55E00", "bfloat16": "#F2A66B"},
    "dark": {"text": "#F0F6FC", "faint": "#A3ADB8", "torch": "#56B4E9", "float32": "#D55E00", "bfloat16": "#F5B98A"},
}
# README shows the picture 540 pixels wide, a telephone some 350: text of 11 points is then 10 pixels high.
_WIDTH, _ROW, _GAP = 5.2, 0.4, 0.9
_TEXT, _SMALL = 11.5, 10.5
_BAR = 0.38


def speedup(records: Iterable[Measurement | NetworkStep], rival: str) -> dict[str, Any]:
    """Return the geometric mean of the speed-ups over `rival`, the worst, the best, and the number of cases."""
    over = [record.speedup_over[rival] for record in records if rival in record.speedup_over]
    return {
        "mean": round(statistics.geometric_mean(over), 2),
        "worst": round(min(over), 2),
        "best": round(max(over), 2),
        "cases": len(over),
    }


def layer_speedup(results: Results, op: str, dtype: str, rival: str = STOCK) -> dict[str, Any]:
    """Return fastbn's speed-up in `op`, over all cases but the sweeps."""
    ours = [m for m in results.measurements if (m.op, m.dtype, m.implementation) == (op, dtype, FASTBN)]
    return speedup((m for m in ours if not is_sweep(m.group)), rival)


def network_speedup(results: Results, op: str, dtype: str) -> dict[str, Any]:
    """Return the speed-up of models after fastbn.convert, over all networks, sizes and formats."""
    return speedup((s for s in results.networks if (s.op, s.dtype, s.implementation) == (op, dtype, FUSED)), TORCH)


def figures(layers: Results, networks: Results) -> dict[str, Any]:
    """Return what the chart shows: its panels, and by row and dtype the speed-ups."""
    count = len({step.network for step in networks.networks})
    return {
        "panels": [
            {
                "title": f"One layer ({layer_speedup(layers, 'train_backward', DTYPES[0])['cases']} shapes)",
                "run": _run(layers),
                "rows": {
                    label: {dtype: layer_speedup(layers, op, dtype) for dtype in DTYPES}
                    for op, label in LAYER_ROWS.items()
                },
            },
            {
                "title": f"A whole network ({count} networks)",
                "run": _run(networks),
                "rows": {
                    label: {dtype: network_speedup(networks, op, dtype) for dtype in DTYPES}
                    for op, label in NETWORK_ROWS.items()
                },
            },
        ]
    }


def alternative(shown: dict[str, Any]) -> str:
    """Return the picture in words, for README's alternative text."""
    panels = []
    for panel in shown["panels"]:
        rows = [
            f"{label} {' and '.join(factor(by_dtype[dtype]['mean']) for dtype in DTYPES)}"
            for label, by_dtype in panel["rows"].items()
        ]
        panels.append(f"{panel['title']}: {'; '.join(rows)}.")
    return f"Times as fast as torch eager on a CPU, {' and '.join(DTYPES)}. {' '.join(panels)}"


def draw(shown: dict[str, Any], theme: str) -> Figure:
    """Draw the panels below each other on one scale, with torch as a line at 1."""
    colors = THEMES[theme]
    rows = sum(len(panel["rows"]) + _GAP for panel in shown["panels"])
    height = _ROW * rows + 1.02
    figure = require("bench", "matplotlib.figure").Figure(figsize=(_WIDTH, height))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0.01, 0.66 / height, 0.98, _ROW * rows / height))
    axes.patch.set_alpha(0)
    widest = max(by["mean"] for panel in shown["panels"] for row in panel["rows"].values() for by in row.values())
    # The labels take the left two fifths, the numbers some of the right.
    axes.set(xlim=(-0.9 * widest, 1.47 * widest), ylim=(rows, 0))
    axes.axis("off")
    at = 0.0
    for number, panel in enumerate(shown["panels"]):
        left = axes.get_xlim()[0]
        axes.text(left, at + 0.55, panel["title"], size=_TEXT, weight="bold", color=colors["text"], va="center")
        at += _GAP
        axes.vlines(1, at, at + len(panel["rows"]), color=colors["torch"], linewidth=2, zorder=2)
        for index, (label, by_dtype) in enumerate(panel["rows"].items()):
            axes.text(-0.04 * widest, at + 0.5, label, size=_TEXT, color=colors["text"], ha="right", va="center")
            for dtype, shift in zip(DTYPES, (-_BAR / 2, _BAR / 2), strict=True):
                mean, worst = by_dtype[dtype]["mean"], by_dtype[dtype]["worst"]
                (bar,) = axes.barh(at + 0.5 + shift, mean, _BAR, color=colors[dtype], zorder=1)
                bar.set_gid(f"bar-{number}-{index}-{dtype}")
                text = f"{factor(mean)} ({factor(worst)})"
                axes.text(mean + 0.04 * widest, at + 0.51 + shift, text, size=_SMALL, color=colors["text"], va="center")
            at += 1
    _captions(figure, height, shown, colors)
    return figure


def _captions(figure: Figure, height: float, shown: dict[str, Any], colors: dict[str, str]) -> None:
    """Write what bars and line are above the panels, and the machines below them."""
    top = 1 - 0.17 / height
    figure.text(0.01, top, "Times as fast as", size=_TEXT, color=colors["text"], va="center")
    figure.text(0.285, top, "| torch eager", size=_TEXT, weight="bold", color=colors["torch"], va="center")
    for at, dtype in zip((0.575, 0.775), DTYPES, strict=True):
        figure.text(at, top, "■", size=_TEXT + 3, color=colors[dtype], va="center")
        figure.text(at + 0.045, top, dtype, size=_TEXT, color=colors["text"], va="center")
    notes = [
        "Geometric mean over the cases (worst case), on a CPU:",
        *dict.fromkeys(panel["run"] for panel in shown["panels"]),
    ]
    for line, note in enumerate(reversed(notes)):
        figure.text(0.01, (0.1 + 0.19 * line) / height, note, size=_SMALL - 1, color=colors["faint"], va="center")


def _run(results: Results) -> str:
    machine = results.machine
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    torch = machine["torch"].partition("+")[0]
    return f"{machine['name']}, {machine['instruction_set']}, {threads}, torch {torch}, {machine['date'][:10]}"


def save(shown: dict[str, Any], folder: Path) -> list[Path]:
    """Write a picture per theme into `folder`. Its description in the metadata is `shown` as JSON."""
    paths = []
    # Text as outlines looks the same everywhere; the salt makes the identifiers, and so the file, the same every time.
    settings = {"svg.fonttype": "path", "svg.hashsalt": "fastbn"}
    with require("bench", "matplotlib").rc_context(settings):
        for theme in THEMES:
            paths.append(folder / f"readme_{theme}.svg")
            metadata = {"Title": "fastbn and torch on a CPU", "Description": json.dumps(shown), "Date": None}
            draw(shown, theme).savefig(paths[-1], metadata=metadata)
            # Matplotlib ends lines with spaces.
            paths[-1].write_text("".join(f"{line.rstrip()}\n" for line in paths[-1].read_text().splitlines()))
    return paths


def described(path: Path) -> dict[str, Any]:
    """Return what the picture says in its metadata that it shows."""
    return json.loads(next(ET.parse(path).iter(DESCRIPTION)).text or "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_chart", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=Path, default=LAYERS, help="results of --suite cpu (default: %(default)s)")
    parser.add_argument("--networks", type=Path, default=NETWORKS, help="results of --suite networks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    args = parser.parse_args()
    shown = figures(load(args.layers), load(args.networks))
    print(*save(shown, args.out), alternative(shown), sep="\n")


if __name__ == "__main__":
    main()
