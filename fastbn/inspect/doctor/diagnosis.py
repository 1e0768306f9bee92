"""The report of `fastbn.doctor`, as a value, as text and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fastbn.inspect.doctor.conversion import Conversion
from fastbn.inspect.doctor.faults import FAULTS, SEVERITIES, Finding, Severity

_WIDTH = 100
_MAX_ROWS = 8  # of each fault in the text
_ROOT = "(the model itself)"


@dataclass(frozen=True)
class Diagnosis:
    """What `fastbn.doctor` found.

    subject: what was examined. layers: how many BatchNorms it has. findings: the worst first. left_out: checks that
    could not be made, and why. conversion: what `fastbn.convert` would do; None for a state_dict.
    `str()` is the report as text.
    """

    subject: str
    layers: int
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...] = ()
    conversion: Conversion | None = None

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of that severity, and of worse ones."""
        return tuple(f for f in self.findings if SEVERITIES.index(f.severity) <= SEVERITIES.index(severity))

    def as_dict(self) -> dict[str, Any]:
        """Return dicts, lists, strings, numbers and None, ready to dump as JSON. docs/doctor.md describes them."""
        return {
            "subject": self.subject,
            "layers": self.layers,
            "findings": [dataclasses.asdict(found) for found in self.findings],
            "left_out": list(self.left_out),
            "conversion": None if self.conversion is None else _conversion_dict(self.conversion),
        }

    def __str__(self) -> str:
        lines = [f"{self.subject}: {_plural(self.layers, 'BatchNorm layer')}", ""]
        for code, group in groupby(self.findings, key=lambda found: found.code):
            lines += [*_fault(code, list(group)), ""]
        lines += [f"Not checked: {reason}" for reason in self.left_out] + [""] * bool(self.left_out)
        counts = [(sum(f.severity == severity for f in self.findings), severity) for severity in SEVERITIES]
        counted = ", ".join(_plural(count, severity) for count, severity in counts if count)
        lines.append(f"{counted}." if counted else "Nothing found.")
        if self.conversion is not None and self.layers:
            lines += ["", *_conversion_text(self.conversion)]
        return "\n".join(lines)


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return findings in the order of FAULTS, and of one fault in that of the layers, none of them twice."""
    codes = list(FAULTS)
    kept: dict[tuple[str, str, str], Finding] = {}
    for found in findings:
        kept.setdefault((found.code, found.layer, found.message if found.code in _SEVERAL else ""), found)
    return tuple(sorted(kept.values(), key=lambda found: codes.index(found.code)))


# Faults that one layer may have in several of its tensors; of others, what two checks saw of a layer is one finding.
_SEVERAL = ("not-finite", "exploded-statistics")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(names: list[str]) -> str:
    """Return up to three names, or two and how many more there are."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _wrapped(text: str, indent: str, first: str | None = None) -> list[str]:
    first = indent if first is None else first
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _fault(code: str, findings: list[Finding]) -> Iterator[str]:
    yield f"{findings[0].severity}  {code}"
    layers: dict[str, list[str]] = {}
    for found in findings:
        layers.setdefault(found.message, []).append(found.layer or _ROOT)
    rows = [(listed(names), message) for message, names in layers.items()]
    width = max(len(names) for names, _ in rows[:_MAX_ROWS])
    yield from (f"  {names:{width}}  {message}" for names, message in rows[:_MAX_ROWS])
    if len(rows) > _MAX_ROWS:
        yield f"  and {len(rows) - _MAX_ROWS} more"
    yield from _wrapped(findings[0].why, "  ")
    yield from _wrapped(findings[0].advice, "     ", "  -> ")


def _conversion_dict(conversion: Conversion) -> dict[str, Any]:
    made = conversion.report
    return {
        "device": conversion.device,
        "layers": {status: made.count(status) for status in ("fused", "converted", "left")},
        "reasons": {layer.path: layer.reason for layer in made.layers if layer.reason},
        "traffic": [
            dataclasses.asdict(row) | {"torch_bytes": _whole(row.torch_bytes), "fastbn_bytes": _whole(row.fastbn_bytes)}
            for row in conversion.traffic
        ],
    }


def _conversion_text(conversion: Conversion) -> Iterator[str]:
    made = conversion.report
    fused, converted, left = (made.count(status) for status in ("fused", "converted", "left"))
    yield f"fastbn.convert(model) would fuse {fused} with what follows, convert {converted} alone and leave {left}."
    for reason, layers in groupby(sorted(made.layers, key=lambda layer: layer.reason), key=lambda layer: layer.reason):
        if reason:
            yield from _wrapped(f"{listed([layer.path or _ROOT for layer in layers])}: {reason}", "    ", "  ")
    if not conversion.traffic:
        return
    total = conversion.torch_bytes, conversion.fastbn_bytes
    yield f"Traffic of these layers on {conversion.device}, predicted from the tensors that are read and written:"
    rows = [
        (f"{row.calls} {row.operation}, by {row.backend}", row.torch_bytes, row.fastbn_bytes)
        for row in conversion.traffic
    ]
    if len(rows) > 1:
        rows.append(("all", *total))
    width = max(len(name) for name, *_ in rows)
    yield f"  {'':{width}}  {'torch eager':>12}  {'fastbn':>12}"
    for name, before, after in rows:
        saved = f"{1 - after / before:.0%} less" if 0 < after < before else ""
        yield f"  {name:{width}}  {_mib(before):>12}  {_mib(after):>12}  {saved}".rstrip()


def _whole(count: float) -> int | None:
    """Return a number of bytes, None for NaN, which stands for what was not counted and is not JSON."""
    return round(count) if count == count else None


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count == count else "not counted"
