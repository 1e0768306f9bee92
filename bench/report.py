"""Writes a run as one Markdown file that needs no other: figures are embedded as data URIs.

It says what was not measured, and states no figure that is not in the records.
"""

from __future__ import annotations

import base64
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import network_tables, tables
from bench.plots import CAPTIONS
from bench.results import Results
from bench.tables import Table, size
from fastbn.measure.implementations import FASTBN

_ABSENT = "Not measured here."
_SPECIAL = re.compile(r"([\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w))")
_CLOCKS = {
    "cpu": "Times are the host's, a sample as many calls as make it long enough to read.",
    "cuda": "Times are the device's: a sample is one call between two CUDA events, with L2 flushed before it.",
}


def write(results: Results, plots: Sequence[Path], path: Path) -> None:
    """Write the report of a run to `path`. `plots` are the PNGs of bench.plots.save_all. Raises OSError."""
    path.write_text("\n".join(_lines(results, plots)) + "\n", encoding="utf-8")


def _lines(results: Results, plots: Sequence[Path]) -> Iterator[str]:
    yield f"# fastbn on {escape(str(results.machine.get('name') or 'an unknown machine'))}"
    yield from ("", "The run is complete." if results.complete else "**Not complete: interrupted, or out of time.**")
    wrong = tables.count_wrong(results)
    if wrong:
        yield from ("", f"**WRONG RESULTS: {wrong}. They are listed under Refused.**")
    yield from ("", *_markdown(Table(("", ""), list(_machine_rows(results)), (0, 1))))
    yield from ("", "## How it was measured", "", " ".join(_method(results)))
    for title, content in (
        ("Summary", _section(tables.summary(results))),
        ("Figures", _figures(plots)),
        ("Calls", _section(tables.calls(results))),
        ("Networks", _networks(results)),
        ("Refused", _refused(results)),
        ("Every case", _section(tables.cases(results, kernels=True))),
        ("Copy bandwidth", _section(tables.copies(results))),
    ):
        yield from ("", f"## {title}", "", *content)


def _machine_rows(results: Results) -> Iterator[tuple[str, str]]:
    machine = results.machine
    yield "device", _value(machine.get("name"))
    gpu = machine.get("gpu")
    if gpu:
        sizes = f"{size(gpu['memory_bytes'])}, L2 {size(gpu['l2_bytes'])}, {gpu['sm_count']} multiprocessors"
        yield "GPU", f"compute capability {gpu['capability']}, {sizes}, driver {_value(gpu.get('driver'))}"
    if machine.get("datasheet_gb_per_s"):
        yield "bandwidth by its datasheet", f"{machine['datasheet_gb_per_s']} GB/s"
    yield "CPU", f"{_value(machine.get('cpu'))}, {_value(machine.get('instruction_set'))}"
    yield "cores, threads", f"{_value(machine.get('cores'))}, {_value(machine.get('threads'))}"
    for name in ("system", "python", "torch"):
        yield name, _value(machine.get(name))
    for name in ("cuda", "cudnn", "triton"):
        if machine.get(name) is not None:  # a CPU run has none
            yield name, _value(machine[name])
    modified = {True: ", with changes that are not committed", False: "", None: ", not known whether changed"}
    source = f"revision {_value(machine.get('revision'))}{modified[machine.get('modified')]}"
    yield FASTBN, f"{_value(machine.get('fastbn'))}, {source}"
    yield "date", _value(machine.get("date"))
    yield "settings", _value(results.settings)


def _method(results: Results) -> Iterator[str]:
    yield "An implementation's results were compared with a float64 reference before it was timed."
    yield "The implementations of a row took turns in one process, round after round."
    if results.machine.get("device") in _CLOCKS:
        yield _CLOCKS[results.machine["device"]]
    yield "A time is the median over the rounds, a speed-up the median over the rounds of two times of the same round."
    if results.measurements:
        rounds = [m.rounds for m in results.measurements]
        spread = statistics.median((m.p80_us - m.p20_us) / m.median_us for m in results.measurements)
        yield f"Rounds: {min(rounds)} to {max(rounds)}."
        yield f"The 80th percentile of a time is {100 * spread:.1f}% of it above the 20th (median over the rows)."
    yield "GB/s counts the minimum of bytes that an op moves, each tensor read or written once;"
    yield "its fraction of a copy is relative to what a copy of a tensor of the same size reached in this run."


def _figures(plots: Sequence[Path]) -> Iterator[str]:
    if not plots:
        yield "Not drawn here."
    explained = set()
    for number, plot in enumerate(plots):
        kind = plot.stem.partition("-")[0]
        name = escape(plot.stem.replace("-", ", "))
        content = base64.b64encode(plot.read_bytes()).decode("ascii")
        yield from [""] * (number > 0)
        yield f"![{name}](data:image/png;base64,{content})"
        # Explain the first page of each kind.
        how = f". {escape(CAPTIONS[kind])}" if kind in CAPTIONS and kind not in explained else ""
        explained.add(kind)
        yield from ("", f"*Figure {number + 1}: {name}*{how}")


def _refused(results: Results) -> Iterator[str]:
    wrong, unsupported = tables.wrong(results), tables.unsupported(results)
    if not results.refusals:
        yield "No implementation was refused."
    if wrong.rows:
        yield from _section(wrong)
    if wrong.rows and unsupported.rows:
        yield ""
    if unsupported.rows:
        yield from _section(unsupported)


def _networks(results: Results) -> Iterator[str]:
    if not results.networks:
        yield _ABSENT
        return
    for number, table in enumerate(network_tables.TABLES):
        yield from [""] * (number > 0)
        yield from _section(table(results))


def _section(table: Table) -> Iterator[str]:
    """Yield the table's notes, a paragraph each, and the table; or that there is none."""
    if not table.rows:
        yield _ABSENT
        return
    for note in table.notes:
        yield from (escape(note), "")
    yield from _markdown(table)


def _markdown(table: Table) -> Iterator[str]:
    rules = [":---" if index in table.left else "---:" for index in range(len(table.header))]
    for cells in (map(escape, table.header), rules, *[map(escape, row) for row in table.rows]):
        yield f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _value(value: object) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "none"
    return str(value)
