"""Measures the error tables of docs/numerics.md, and writes them into the page.

    python -m docs.numerics --measure     # compares with float64 and writes docs/numerics.json (a minute on one core)
    python -m docs.numerics               # writes the tables of docs/numerics.json into docs/numerics.md

Measuring needs a clone, whose `bench` describes the machine. A test holds page and file together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine
from fastbn.cli.verify import FULL_CASES
from fastbn.testing import VerifyCase, compare_case

PAGE, FILE = Path(__file__).with_name("numerics.md"), Path(__file__).with_name("numerics.json")
BEGIN, END = "<!-- tables: python -m docs.numerics -->\n", "<!-- end of tables -->\n"
KEPT = ("name", "threads", "torch", "fastbn", "instruction_set", "date")
QUANTITIES = ("output", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
# Channels far from zero: |mean| / std from 0 to 1e6.
MEANS, SHAPE, FAR = (0.0, 1e2, 1e4, 1e6), (32, 16, 28, 28), 1e2


def measured() -> dict[str, Any]:
    """Return machine and errors: of the cases of `fastbn verify`, and of channels with a large mean."""
    about = {key: value for key, value in machine(torch.device("cpu")).items() if key in KEPT}
    layouts = ("contiguous", "channels_last")
    far = [VerifyCase(SHAPE, mean=mean, std=1.0, layout=layout) for layout in layouts for mean in MEANS]
    return {"machine": about, "cases": list(_rows(FULL_CASES)), "means": list(_rows(far))}


def _rows(cases: Iterable[VerifyCase]) -> Iterator[dict[str, Any]]:
    for case in cases:
        row = {
            "operation": case.operation + ("" if case.training else ", eval"),
            "shape": "x".join(map(str, case.shape)),
            "layout": case.layout,
            "dtype": str(case.dtype).removeprefix("torch."),
            "mean": case.mean,
            "std": case.std,
        }
        errors = {c.quantity: [round(c.fastbn, 3), round(c.stock, 3), c.passed] for c in compare_case(case)}
        yield row | {"errors": {name: error for name, error in errors.items() if name in QUANTITIES}}


def written(page: str, data: dict[str, Any]) -> str:
    """Return a page with its tables as the data have them."""
    head, _, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}, got a page without them")
    return head + BEGIN + "\n" + tables(data) + "\n" + END + tail


def tables(data: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    about = data["machine"]
    where = f"{about['name']} ({about['instruction_set']}, threads: {about['threads']})"
    keys = ("operation", "shape", "layout", "dtype")
    usual = [row for row in data["cases"] if row["mean"] < FAR]
    far = [row for row in data["cases"] if row["mean"] >= FAR]
    lines = [
        f"Measured on {about['date'][:10]} on an {where},",
        f"with torch {about['torch']} and fastbn {about['fastbn']}. A cell has fastbn's error, then torch's, in ulp.",
        "",
        *_table(usual, keys, ("output", "running_var", "grad_input")),
        "",
        "### A mean far from zero",
        "",
        f"Float32 input of shape {data['means'][0]['shape']} with standard deviation 1, in training. What changes from",
        "row to row is the mean.",
        "",
        *_table(data["means"], ("layout", "mean"), ("output", "running_var", "grad_input", "grad_weight")),
        "",
        f"With a mean of {far[0]['mean']:g} and a standard deviation of {far[0]['std']:g}:",
        "",
        *_table(far, keys, ("output", "running_var", "grad_input")),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], keys: tuple[str, ...], quantities: tuple[str, ...]) -> Iterator[str]:
    yield "| " + " | ".join((*keys, *quantities)) + " |"
    yield "|---" * len(keys) + "|---:" * len(quantities) + "|"
    for row in rows:
        cells = [f"{row[key]:g}" if key == "mean" else row[key] for key in keys]
        cells += [_cell(row["errors"].get(quantity)) for quantity in quantities]
        yield "| " + " | ".join(cells) + " |"


def _cell(error: list[Any] | None) -> str:
    return "" if error is None else f"{_number(error[0])} / {_number(error[1])}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.numerics", description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="measure on this machine first")
    if parser.parse_args().measure:
        FILE.write_text(json.dumps(measured(), indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
