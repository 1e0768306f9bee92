"""What a check came to, and the table that is printed of all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check of one file: what was found, and what is wrong with it, or "" if nothing is."""

    file: str
    check: str
    found: str
    problem: str = ""


def lines(findings: Iterable[Finding]) -> list[str]:
    """Return the findings as aligned text, under the name of each file."""
    findings = list(findings)
    width = max((len(finding.check) for finding in findings), default=0)
    result, file = [], None
    for finding in findings:
        if finding.file != file:
            file = finding.file
            result.append(file)
        verdict = "MISS" if finding.problem else "ok  "
        text = f"{finding.found}: {finding.problem}" if finding.problem else finding.found
        result.append(f"  {verdict}  {finding.check.ljust(width)}  {text}")
    return result
