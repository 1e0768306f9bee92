"""Figures of a run as PNG: a memory roofline, speed-ups case by case, growth with one size.

Colours are Okabe and Ito's, which the colour-blind can tell apart; markers tell them apart in grey too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.results import Measurement, Results
from bench.tables import (
    FASTBN,
    by_workload,
    dtype_order,
    implementations,
    is_again,
    is_rival,
    is_sweep,
    op_order,
)
from fastbn.cli.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Captions, by the first part of the file name.
CAPTIONS = {
    "bandwidth": "The minimum of bytes that an op moves, over its time, against the size of one tensor. The line is "
    "what a copy of such a tensor reached in the same run. Filled markers are contiguous tensors, hollow ones "
    "channels_last. Higher is better.",
    "speedup": "How many times as fast as a rival fastbn was: a row per case, a marker per op. Right of the line at 1 "
    "fastbn is faster, in the shaded part the rival. A marker at 16 or 1/16 belongs there or beyond.",
    "growth": "Time against one size of the tensor, the others fixed, both axes logarithmic. Along the dotted line "
    "time is in proportion to size; a flat start is the cost of a call. Hollow markers on dashed lines are "
    "channels_last. Lower is better.",
}
_BANDWIDTH_OPS = ("train", "train_backward", "train_backward+relu", "eval")
# (colour, marker)
_Style = tuple[str, str]
_STYLES = {
    "torch": ("#0072B2", "o"),
    "compile": ("#009E73", "s"),
    "compile-max-autotune": ("#CC79A7", "D"),
    "onednn": ("#E69F00", "^"),
    "fastbn": ("#D55E00", "v"),
}
_SPARE_STYLES = (("#000000", "P"), ("#56B4E9", "X"), ("#999999", "<"))
_FUSED_STYLES = (
    ("#000000", "o"),
    ("#E69F00", "^"),
    ("#0072B2", "s"),
    ("#CC79A7", "D"),
    ("#009E73", "v"),
    ("#D55E00", "P"),
    ("#56B4E9", "X"),
)
_BLACK, _GREY, _LIGHT, _SHADE = "#000000", "#777777", "#DDDDDD", "#F0F0F0"
_COPY = {"color": _BLACK, "linewidth": 1.2}
_DATASHEET = {"color": _BLACK, "linewidth": 1.2, "linestyle": "--"}
_PROPORTIONAL = {"color": _GREY, "linewidth": 1.2, "linestyle": ":"}
_ROWS_A_PAGE = 44
# Speed-ups beyond this factor are drawn at it: one of 100 would leave the others on a line.
_WIDEST = 16


def save_all(results: Results, directory: Path) -> list[Path]:
    """Write the figures that there are records for into `directory`. Returns their paths in the order to show them.

    Raises CommandError where matplotlib is not installed.
    """
    paths = []
    # Names of machines and cases are not formulas, even if they contain $.
    with require("bench", "matplotlib").rc_context({"text.parse_math": False}):
        for name, figure in {**bandwidth(results), **speedup(results), **growth(results)}.items():
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def bandwidth(results: Results) -> dict[str, Figure]:
    """Plot achieved GB/s against the bytes of one tensor, a panel per op, with the copy."""
    shown = [m for m in results.measurements if not is_sweep(m.group) and not is_again(m.implementation)]
    ops = [op for op in _BANDWIDTH_OPS if any(m.op == op for m in shown)]
    if not ops:
        return {}
    shown = [m for m in shown if m.op in ops]
    styles, lines = _styles(shown), _bandwidth_lines(results)
    columns = min(2, len(ops))
    rows = math.ceil(len(ops) / columns)
    keys = {**_keys(styles, shown), **{name: style for name, (_, style) in lines.items()}}
    figure = _figure(results, "Achieved bandwidth", 1 + 4.8 * columns, 1.3 + 3.4 * rows, keys)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    sizes = [m.tensor_bytes for m in shown]
    for index, (axes, op) in enumerate(itertools.zip_longest(panels, ops)):
        if op is None:
            axes.set_visible(False)
            continue
        for points, style in lines.values():
            axes.plot(*_columns(points), **style)
        for (name, style), hollow in itertools.product(styles.items(), (False, True)):
            some = [m for m in shown if (m.op, m.implementation, _is_channels_last(m)) == (op, name, hollow)]
            points = [(m.tensor_bytes, m.gb_per_s) for m in some]
            axes.plot(*_columns(points), linestyle="none", **_marker(style, hollow))
        axes.set(title=op, xlim=(min(sizes) / 2, max(sizes) * 2), ylabel="GB/s")
        _frame(axes)
        _log_axes(axes)
        axes.xaxis.set_major_formatter(require("bench", "matplotlib.ticker").EngFormatter("B"))
        if index + columns >= len(ops):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("size of one tensor", fontsize=9)
    return {"bandwidth": figure}


def _bandwidth_lines(results: Results) -> dict[str, tuple[list[tuple], dict]]:
    """Return points and style of each line, by its name in the legend."""
    copied = sorted((point.bytes, point.gb_per_s) for point in results.copy)
    lines = {"copy": (copied, _COPY)} if copied else {}
    datasheet = results.machine.get("datasheet_gb_per_s")
    if datasheet:
        sizes = [m.tensor_bytes for m in results.measurements]
        lines["datasheet"] = [(min(sizes) / 2, datasheet), (max(sizes) * 2, datasheet)], _DATASHEET
    return lines


class _Row(NamedTuple):
    """A case and its speed-ups by op, or the heading of the rows below."""

    label: str
    over: dict[str, float]


def speedup(results: Results) -> dict[str, Figure]:
    """Plot fastbn's speed-up over each rival, one or more pages per dtype: a row per case, a panel per mode, a marker
    per op.
    """
    figures = {}
    workloads = by_workload(m for m in results.measurements if not is_sweep(m.group))
    for dtype in sorted({dtype for _, dtype, _ in workloads}, key=dtype_order):
        ours = [at[FASTBN] for (_, of, _), at in workloads.items() if of == dtype and FASTBN in at]
        pages = list(_pages(_speedup_blocks(ours)))
        for number, rows in enumerate(pages, 1):
            name, title = f"speedup-{dtype}", f"Speed-up of fastbn, {dtype}"
            if len(pages) > 1:
                name, title = f"{name}-{number}", f"{title} ({number} of {len(pages)})"
            figures[name] = _speedup_page(results, title, rows)
    return figures


def _speedup_blocks(ours: list[Measurement]) -> Iterator[list[_Row]]:
    """Yield rows under a heading, a block per rival and group."""
    for rival in dict.fromkeys(name for m in ours for name in m.speedup_over if is_rival(name)):
        against = [m for m in ours if rival in m.speedup_over]
        for group in dict.fromkeys(m.group for m in against):
            rows: dict[str, _Row] = {}
            for m in against:
                if m.group == group:
                    rows.setdefault(m.case, _Row(_case_label(m), {})).over[m.op] = m.speedup_over[rival]
            yield [_Row(f"over {rival}: {group}", {}), *rows.values()]


def _pages(blocks: Iterable[list[_Row]]) -> Iterator[list[_Row]]:
    """Fill pages about evenly. A block that continues on the next page repeats its heading."""
    blocks = list(blocks)
    total = sum(map(len, blocks))
    length = math.ceil(total / math.ceil(total / _ROWS_A_PAGE)) + 1 if total else 0
    page: list[_Row] = []
    for heading, *rows in blocks:
        while rows:
            # Keep at least three rows with a heading.
            if page and len(page) + min(len(rows), 3) >= length:
                yield page
                page = []
            fitting = max(1, length - len(page) - 1)
            page += [heading, *rows[:fitting]]
            rows = rows[fitting:]
    if page:
        yield page


def _speedup_page(results: Results, title: str, rows: list[_Row]) -> Figure:
    ops = sorted({op for row in rows for op in row.over}, key=op_order)
    modes = list(dict.fromkeys(op.partition("+")[0] for op in ops))
    fused = sorted({op.partition("+")[2] for op in ops}, key=lambda rest: (bool(rest), rest.count("+"), rest))
    styles = dict(zip(fused, itertools.cycle(_FUSED_STYLES)))
    keys = {f"+{rest}" if rest else "BatchNorm": _key(style) for rest, style in styles.items()}
    figure = _figure(results, title, 2.6 + 2.1 * len(modes), 1.6 + 0.19 * len(rows), keys)
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    speedups = [speedup for row in rows for speedup in row.over.values()]
    low_edge, high_edge = max(1 / _WIDEST, min(speedups + [0.53])), min(_WIDEST, max(speedups + [1.9]))
    low, high = 0.9 * low_edge, 1.1 * high_edge
    for axes, mode in zip(panels, modes):
        axes.axvspan(low, 1, color=_SHADE, zorder=0)
        axes.axvline(1, color=_BLACK, linewidth=1, zorder=1)
        for index, (rest, style) in enumerate(styles.items()):
            op = f"{mode}+{rest}" if rest else mode
            # Markers of a row are shifted, since equal speed-ups would hide each other.
            shift = (index - (len(styles) - 1) / 2) * min(0.2, 0.6 / len(styles))
            points = [
                (min(max(row.over[op], low_edge), high_edge), at + shift)
                for at, row in enumerate(rows)
                if op in row.over
            ]
            axes.plot(*_columns(points), linestyle="none", **_marker(style, markersize=4))
        axes.hlines([at for at, row in enumerate(rows) if row.over], low, high, color=_LIGHT, linewidth=0.5, zorder=0.5)
        axes.set(title=mode, xlabel="rival's time / fastbn's", ylim=(len(rows) - 0.4, -0.6))
        _frame(axes)
        _octaves(axes, low, high)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", top=True, labeltop=len(rows) > 25)
    labels = [row.label for row in rows]
    # A shape in two layouts: the second row names the layout alone.
    short = [label.removeprefix(f"{above} ") for above, label in zip(["", *labels], labels)]
    panels[0].set_yticks(range(len(rows)), short)
    for row, label in zip(rows, panels[0].get_yticklabels()):
        label.set_fontweight("normal" if row.over else "bold")
    return figure


def _octaves(axes: Axes, low: float, high: float) -> None:
    """Make a logarithmic x axis with ticks at powers of 2, or of 4, 8 and so on where those would be many."""
    axes.set(xscale="log", xlim=(low, high))
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = math.ceil((last - first + 1) / 6)
    powers = [power for power in range(first, last + 1) if power % step == 0]
    axes.set_xticks([2.0**power for power in powers], [f"{2.0**power:g}" for power in powers])
    axes.minorticks_off()


def _log_axes(axes: Axes) -> None:
    """Make logarithmic axes with plain numbers, within two decades also at 2 and 5."""
    ticker = require("bench", "matplotlib.ticker")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(ticker.LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())


def growth(results: Results) -> dict[str, Figure]:
    """Plot time against the size that a sweep changes: a figure per dtype, a column per sweep, a row per op."""
    sweeps = [m for m in results.measurements if is_sweep(m.group) and not is_again(m.implementation)]
    figures = {}
    for dtype in sorted({m.dtype for m in sweeps}, key=dtype_order):
        shown = [m for m in sweeps if m.dtype == dtype]
        figures[f"growth-{dtype}"] = _growth_page(results, f"Time against one size, {dtype}", shown)
    return figures


def _growth_page(results: Results, title: str, shown: list[Measurement]) -> Figure:
    sweeps = list(dict.fromkeys(m.group for m in shown))
    ops = sorted({m.op for m in shown}, key=op_order)
    styles = _styles(shown)
    keys = {**_keys(styles, shown), "in proportion": _PROPORTIONAL}
    figure = _figure(results, title, 1 + 3.3 * len(sweeps), 1.3 + 2.9 * len(ops), keys)
    panels = figure.subplots(len(ops), len(sweeps), sharex="col", sharey=True, squeeze=False).flat
    for axes, (op, sweep) in zip(panels, itertools.product(ops, sweeps)):
        here = [m for m in shown if (m.op, m.group) == (op, sweep)]
        for (name, style), hollow in itertools.product(styles.items(), (False, True)):
            some = [m for m in here if (m.implementation, _is_channels_last(m)) == (name, hollow)]
            points = sorted((_swept(m), m.median_us) for m in some)
            axes.plot(*_columns(points), linestyle="--" if hollow else "-", linewidth=1.2, **_marker(style, hollow))
        if here:
            # It goes through the longest time, so that lines leave it where the cost of a call dominates.
            end, time = max((_swept(m), m.median_us) for m in here)
            shortest = min(m.median_us for m in here)
            axes.plot([end * shortest / time, end], [shortest, time], zorder=1, **_PROPORTIONAL)
        shape = _swept_shape([m for m in shown if m.group == sweep])
        axes.set(title=f"{op}, {shape}", xlabel=sweep.removeprefix("sweep "), ylabel="µs")
        _frame(axes)
        _log_axes(axes)
    return figure


def _swept(m: Measurement) -> int:
    """Return the size that a sweep changes: N, C, or the number of pixels."""
    return {"sweep N": m.shape[0], "sweep C": m.shape[1]}.get(m.group, math.prod(m.shape[2:]))


def _swept_shape(sweep: list[Measurement]) -> str:
    """Write the shapes of a sweep as one: numbers where they agree, letters where they differ."""
    names = ("N", "C", *{1: "L", 2: "HW", 3: "DHW"}.get(len(sweep[0].shape) - 2, ""))
    sizes = [set(of_dimension) for of_dimension in zip(*[m.shape for m in sweep])]
    return "x".join(str(*some) if len(some) == 1 else name for name, some in zip(names, sizes))


def _case_label(m: Measurement) -> str:
    """Write a case under its group's heading."""
    return "x".join(map(str, m.shape)) + (f" {m.layout}" if m.layout != "contiguous" else "")


def _is_channels_last(m: Measurement) -> bool:
    return m.layout.startswith("channels_last")


def _columns(points: list[tuple]) -> tuple:
    return tuple(zip(*points)) or ((), ())


def _styles(shown: list[Measurement]) -> dict[str, _Style]:
    spare = itertools.cycle(_SPARE_STYLES)
    return {name: _STYLES.get(name) or next(spare) for name in implementations(shown)}


def _marker(style: _Style, hollow: bool = False, markersize: float = 5) -> dict:
    color, marker = style
    face = "white" if hollow else color
    return {"color": color, "marker": marker, "markersize": markersize, "markerfacecolor": face}


def _key(style: _Style, hollow: bool = False) -> dict:
    return {"linestyle": "none", **_marker(style, hollow)}


def _keys(styles: dict[str, _Style], shown: list[Measurement]) -> dict[str, dict]:
    """Return the legend of implementations and, where both occur, of layouts."""
    keys = {name: _key(style) for name, style in styles.items()}
    if len({_is_channels_last(m) for m in shown}) == 2:
        keys["contiguous"], keys["channels_last"] = (_key((_GREY, "o"), hollow) for hollow in (False, True))
    return keys


def _figure(results: Results, title: str, width: float, height: float, keys: dict[str, dict]) -> Figure:
    """Make a figure of `width` x `height` inches with a title, a legend at the bottom, and below it the machine and the
    versions.

    `keys` gives the line or marker of each entry of the legend.
    """
    # A Figure of its own, without pyplot, needs no display and leaves no global state.
    width = max(width, 7)  # the small print needs as much
    figure = require("bench", "matplotlib.figure").Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=12)
    figure.text(0.5, 0.08 / height, _small_print(results), fontsize=7.5, color=_GREY, horizontalalignment="center")
    columns = min(len(keys), int(width / 1.4))
    # The layout engine ignores text below a legend: reserve the space for both here.
    foot = 0.3 + 0.2 * math.ceil(len(keys) / columns)
    figure.get_layout_engine().set(rect=(0, foot / height, 1, 1 - foot / height))
    Line2D = require("bench", "matplotlib.lines").Line2D
    handles = [Line2D([], [], label=name, **style) for name, style in keys.items()]
    at = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.25 / height), "borderaxespad": 0, "borderpad": 0}
    figure.legend(handles=handles, ncols=columns, frameon=False, fontsize=9, **at).set_in_layout(False)
    return figure


def _small_print(results: Results) -> str:
    machine = results.machine
    parts = [machine.get("name"), *[f"{name} {machine[name]}" for name in ("torch", FASTBN) if machine.get(name)]]
    parts += [str(machine.get("date") or "")[:10], None if results.complete else "incomplete run"]
    return ", ".join(str(part) for part in parts if part)


def _frame(axes: Axes) -> None:
    axes.title.set_size(10)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    axes.grid(color=_LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.label_outer()
