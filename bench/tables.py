"""Tables of a run: each function builds one, `Table.lines` renders it as aligned text, bench/report.py as Markdown.

Speed-ups are averaged by their geometric mean: a case twice as fast and one twice as slow cancel. Sweeps are left out
of averages: their sizes were chosen to show growth, not for what users run.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.results import DTYPES, Call, Measurement, NetworkStep, Results
from fastbn.cli.text import table
from fastbn.measure.implementations import AGAIN, FASTBN, STOCK
from fastbn.measure.operations import MODES

# A case counts as slower below this speed-up: nearer to 1 the noise of a run decides.
SLOWER = 0.97


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header. Columns in `left` hold text, the others numbers. Notes stand above the table."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the notes and the table as aligned text, or nothing for a table without rows."""
        return [*self.notes, *table([self.header, *self.rows], self.left)] if self.rows else []


def summary(results: Results) -> Table:
    """Compare fastbn with every rival, over all cases but the sweeps: a row per op and dtype."""
    measurements = [m for m in results.measurements if not is_sweep(m.group)]
    rivals = [name for name in implementations(measurements) if name not in (STOCK, FASTBN) and not is_again(name)]
    header = ("op", "dtype", "cases", f"over {STOCK}", "worst", "best", f"below {SLOWER}")
    header += (*[f"over {name}" for name in rivals], "of a copy", "worst case")
    rows = []
    for op, dtype in sorted(
        {(m.op, m.dtype) for m in measurements}, key=lambda key: (op_order(key[0]), dtype_order(key[1]))
    ):
        ours = [m for m in measurements if (m.op, m.dtype, m.implementation) == (op, dtype, FASTBN)]
        over = sorted((m.speedup_over[STOCK], m.case) for m in ours if STOCK in m.speedup_over)
        rows.append(
            (
                op,
                dtype,
                str(len(ours)),
                mean_speedup(ours, STOCK),
                *([factor(over[0][0]), factor(over[-1][0])] if over else ["-", "-"]),
                str(sum(speedup < SLOWER for speedup, _ in over)) if over else "-",
                *[mean_speedup(ours, name) for name in rivals],
                percent(statistics.median(m.copy_share for m in ours)) if ours else "-",
                over[0][1] if over else "-",
            )
        )
    notes = [
        "fastbn's speed-up: geometric mean over the cases, sweeps left out; in brackets over how many, where not all.",
        "of a copy: median fraction of the bandwidth that a copy of the same tensor reached.",
        *noise(results.measurements),
    ]
    return Table(header, rows, (0, 1, len(header) - 1), tuple(notes))


def cases(results: Results, limit: int | None = None, kernels: bool = False) -> Table:
    """List every case, dtype and op, or the `limit` of them in which fastbn does worst against torch.

    `kernels` adds columns with the kernels that torch and fastbn ran.
    """
    names = implementations(results.measurements)
    header = ("case", "dtype", "op", *[f"{name} µs" for name in names])
    header += (f"over {STOCK}", "over fastest rival", "GB/s", "of a copy")
    header += (f"{STOCK} ran on", f"{FASTBN} ran on") * kernels
    workloads = list(by_workload(results.measurements).items())
    notes = []
    if limit is not None:
        workloads = sorted(filter(_is_compared, workloads), key=lambda item: item[1][FASTBN].speedup_over[STOCK])
        shown = f"The {min(limit, len(workloads))} of {len(workloads)} rows"
        notes = [f"{shown} in which {FASTBN} does worst against {STOCK}, worst first:"]
    rows = []
    for (case, dtype, op), measured in workloads[:limit]:
        ours = measured.get(FASTBN)
        over = ours.speedup_over if ours else {}
        rivals = [speedup for name, speedup in over.items() if is_rival(name)]
        rows.append(
            (
                case,
                dtype,
                op,
                *[significant(measured[name].median_us) if name in measured else "-" for name in names],
                factor(over[STOCK]) if STOCK in over else "-",
                factor(min(rivals)) if rivals else "-",
                significant(ours.gb_per_s) if ours else "-",
                percent(ours.copy_share) if ours else "-",
                *[measured[name].kernel if name in measured else "-" for name in (STOCK, FASTBN) * kernels],
            )
        )
    text = (0, 1, 2, *range(len(header) - 2 * kernels, len(header)))
    return Table(header, rows, text, tuple(notes))


def calls(results: Results) -> Table:
    """List the calls that were counted: host time, launches, memory."""
    header = ("case", "dtype", "op", "implementation", "host µs", "p20", "p80", "launches", "held", "peak", "ran on")
    rows = [
        (
            call.case,
            call.dtype,
            call.op,
            call.implementation,
            *_times(call),
            known(call.launches, str),
            known(call.held_bytes, size),
            known(call.peak_bytes, size),
            call.kernel,
        )
        for call in results.calls
    ]
    notes = (
        "host µs: from call to return, nothing else queued. launches: of kernels, on a GPU.",
        "held: the output and what forward keeps for backward, without the input. peak: the maximum allocated at once.",
    )
    return Table(header, rows, (0, 1, 2, 3, 10), notes)


def wrong(results: Results) -> Table:
    """List the wrong results one by one."""
    refusals = [refusal for refusal in results.refusals if refusal.wrong]
    rows = [(r.implementation, r.case, r.dtype, r.op, str(r.count), _one_line(r.reason)) for r in refusals]
    notes = (
        f"WRONG RESULTS: {count_wrong(results)}, not timed. Where a reason came up more than once, the first case:",
    )
    return Table(("implementation", "case", "dtype", "op", "times", "reason"), rows, (0, 1, 2, 3, 5), notes)


def unsupported(results: Results) -> Table:
    """Count how often each implementation could not take a case, by reason."""
    counts: Counter[tuple[str, str]] = Counter()
    for r in results.refusals:
        if not r.wrong:
            counts[r.implementation, _one_line(r.reason)] += r.count
    rows = [(name, str(count), reason) for (name, reason), count in counts.most_common()]
    notes = ("Not timed: the implementation does not take the case, or raised an error:",)
    return Table(("implementation", "times", "reason"), rows, (0, 2), notes)


def copies(results: Results) -> Table:
    """List the bandwidth that copies reached, by size."""
    rows = [(size(p.bytes), significant(p.median_us), significant(p.gb_per_s)) for p in results.copy]
    notes = ("Copies of one tensor, which read it and write it once each:",)
    return Table(("tensor", "µs", "GB/s"), rows, (), notes)


def by_workload(measurements: Iterable[Measurement]) -> dict[tuple[str, str, str], dict[str, Measurement]]:
    """Group measurements by (case, dtype, op), then by implementation.

    The order is that of the run, but a group's cases stand together, and so do a case's measurements.
    """
    found: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    groups: dict[str, int] = {}
    cases: dict[str, tuple[int, int]] = {}
    for m in measurements:
        cases.setdefault(m.case, (groups.setdefault(m.group, len(groups)), len(cases)))
        found.setdefault((m.case, m.dtype, m.op), {})[m.implementation] = m
    return dict(
        sorted(found.items(), key=lambda item: (cases[item[0][0]], dtype_order(item[0][1]), op_order(item[0][2])))
    )


def implementations(measurements: Iterable[Measurement | NetworkStep]) -> list[str]:
    """Return the names that occur: torch first, fastbn last, the others in the order of the run."""
    names = dict.fromkeys(m.implementation for m in measurements)
    return sorted(names, key=lambda name: (name == FASTBN, name.startswith(FASTBN), name.removesuffix(AGAIN) != STOCK))


def count_wrong(results: Results) -> int:
    return sum(refusal.count for refusal in results.refusals if refusal.wrong)


def is_sweep(group: str) -> bool:
    return group.startswith("sweep ")


def is_again(name: str) -> bool:
    """Return whether this is an implementation measured a second time, for the noise."""
    return name.endswith(AGAIN)


def is_rival(name: str) -> bool:
    return not name.startswith(FASTBN) and not is_again(name)


def op_order(op: str) -> tuple:
    """Return a key that sorts ops by mode, then by how much is fused."""
    mode, *fused = op.split("+")
    return MODES.index(mode) if mode in MODES else len(MODES), len(fused), op


def dtype_order(dtype: str) -> tuple:
    return DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES), dtype


def significant(value: float) -> str:
    """Write three significant digits without an exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def factor(value: float) -> str:
    return f"{value:.2f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%"


def size(count: int) -> str:
    """Write bytes in decimal units, as bandwidths count them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{significant(count / scale)} {unit}"
    return f"{count} B"


def mean_speedup(measurements: Sequence[Measurement | NetworkStep], rival: str) -> str:
    """Write the geometric mean, with the number of cases in brackets where the rival was not measured on all."""
    over = [m.speedup_over[rival] for m in measurements if rival in m.speedup_over]
    if not over:
        return "-"
    mean = factor(statistics.geometric_mean(over))
    return mean if len(over) == len(measurements) else f"{mean} ({len(over)})"


def noise(measurements: Sequence[Measurement | NetworkStep]) -> list[str]:
    """Write the speed-up of each implementation that was measured twice over itself."""
    notes = []
    for name in filter(is_again, implementations(measurements)):
        once = name.removesuffix(AGAIN)
        over = [m.speedup_over[once] for m in measurements if m.implementation == name and once in m.speedup_over]
        if over:
            mean, low, high = (f"{value:.3f}" for value in (statistics.geometric_mean(over), min(over), max(over)))
            notes.append(f"noise: {once} over itself {mean}, from {low} to {high}, on {len(over)} rows of cases.")
    return notes


def _times(call: Call) -> list[str]:
    """Write the median and the 20th and 80th percentile."""
    return [significant(time) for time in (call.median_us, call.p20_us, call.p80_us)]


def _is_compared(item: tuple[object, dict[str, Measurement]]) -> bool:
    return FASTBN in item[1] and STOCK in item[1][FASTBN].speedup_over


def known(value, write: Callable[..., str]) -> str:
    return "-" if value is None else write(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
