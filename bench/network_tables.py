"""Tables of the networks of a run: geometric means, a row per network, and every case, the slowest first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.network_cases import EVAL, SMALL, TRAIN, USUAL
from bench.network_models import FUSED, NAMES, TORCH, is_ours
from bench.results import NetworkStep, Results
from bench.tables import (
    SLOWER,
    Table,
    dtype_order,
    factor,
    is_again,
    known,
    mean_speedup,
    noise,
    op_order,
    percent,
    significant,
    size,
)

_Key = tuple[str, str, str]


def means(results: Results) -> Table:
    """Compare each implementation with torch's modules, over all networks: a row per op and dtype."""
    header = ("op", "dtype", "implementation", "cases", f"over {TORCH}", "worst", "best", f"below {SLOWER}")
    header += ("worst case",)
    found: dict[tuple[str, str, str], list[NetworkStep]] = {}
    for step in results.networks:
        if TORCH in step.speedup_over and not is_again(step.implementation):
            found.setdefault((step.op, step.dtype, step.implementation), []).append(step)
    rows = []
    for op, dtype, name in sorted(found, key=lambda key: (op_order(key[0]), dtype_order(key[1]), _order(key[2]))):
        steps = found[op, dtype, name]
        over = sorted((step.speedup_over[TORCH], step.case) for step in steps)
        slower = sum(speedup < SLOWER for speedup, _ in over)
        extremes = factor(over[0][0]), factor(over[-1][0])
        rows.append((op, dtype, name, str(len(steps)), mean_speedup(steps, TORCH), *extremes, str(slower), over[0][1]))
    notes = (
        f"Networks: the geometric mean over the cases of {TORCH}'s time over each one's.",
        *noise(results.networks),
    )
    return Table(header, rows, (0, 1, 2, 8), notes)


def by_network(results: Results) -> Table:
    """Compare fused models with torch's modules: a row per network, the geometric means over dtypes and formats."""
    columns = [(op, group) for op in (TRAIN, EVAL) for group in (SMALL, USUAL)]
    fused = [step for step in results.networks if step.implementation == FUSED and TORCH in step.speedup_over]
    rows = []
    for network in dict.fromkeys(step.network for step in fused):
        cells = []
        for op, group in columns:
            steps = [step for step in fused if (step.network, step.op, step.group) == (network, op, group)]
            over = [step.speedup_over[TORCH] for step in steps]
            cells.append(f"{factor(statistics.geometric_mean(over))} ({factor(min(over))})" if over else "-")
        rows.append((network, *cells))
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    notes = (
        f"{TORCH}'s time over that of {FUSED} models: the geometric mean over dtypes and formats (the worst of them).",
    )
    return Table(("network", *(f"{op} {group}" for op, group in columns)), rows, (0,), notes)


def cases(results: Results) -> Table:
    """List every case, that in which fastbn does worst first."""
    found: dict[_Key, dict[str, NetworkStep]] = {}
    for step in results.networks:
        found.setdefault(step.key[:3], {})[step.implementation] = step
    names = sorted({step.implementation for step in results.networks if not is_again(step.implementation)}, key=_order)
    names = [name for name in names if name != TORCH]
    has_peak = any(step.peak_bytes is not None for step in results.networks)
    header = ("network", "size", "input", "dtype", "layout", "op", f"{TORCH} ms", *names)
    header += (f"{TORCH} norm share", f"{FUSED} norm share", *(f"{TORCH} peak", f"{FUSED} peak") * has_peak)
    rows = []
    for steps in sorted(found.values(), key=_slowest):
        any_step, stock = next(iter(steps.values())), steps.get(TORCH)
        over = [steps[name].speedup_over.get(TORCH) if name in steps else None for name in names]
        pair = [steps.get(name) for name in (TORCH, FUSED)]
        rows.append(
            (
                any_step.network,
                any_step.group,
                "x".join(map(str, any_step.shape)),
                any_step.dtype,
                any_step.layout,
                any_step.op,
                significant(stock.median_us / 1e3) if stock else "-",
                *[known(speedup, factor) for speedup in over],
                *[known(step and step.norm_share, percent) for step in pair],
                *[known(step and step.peak_bytes, size) for step in pair] * has_peak,
            )
        )
    notes = (
        f"Networks, slowest first: milliseconds of {TORCH}'s modules, and that time over the others'.",
        "train_backward: forward, loss and backward, no optimiser. eval: without gradients. bfloat16: autocast.",
        *["step: train_backward and an update by SGD."] * any(step.op == "step" for step in results.networks),
        "norm share: fraction of the time in BatchNorm, activation and residual addition.",
        f"Sources: {', '.join(_sources(results.networks))}.",
    )
    return Table(header, rows, tuple(range(6)), notes)


TABLES = (means, by_network, cases)


def _order(name: str) -> tuple[int, str]:
    return NAMES.index(name) if name in NAMES else len(NAMES), name


def _slowest(steps: dict[str, NetworkStep]) -> float:
    """Return the lowest speed-up over torch of what is compared with it, or infinity."""
    compared = [step for name, step in steps.items() if is_ours(name) and not is_again(name)]
    return min((step.speedup_over[TORCH] for step in compared if TORCH in step.speedup_over), default=float("inf"))


def _sources(steps: Iterable[NetworkStep]) -> Sequence[str]:
    """Return where the definitions are from, each with its networks."""
    networks: dict[str, dict[str, None]] = {}
    for step in steps:
        networks.setdefault(step.source, {})[step.network] = None
    return [f"{source} ({', '.join(names)})" for source, names in networks.items()]
