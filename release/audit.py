"""Check that wheels are fit to be published; print a table, and exit with 1 if one is not."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from release import binaries, wheels
from release.report import Finding, lines

SUMMARY = "check wheels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wheels", nargs="+", type=Path, metavar="FILE.whl")


def audit(path: Path) -> list[Finding]:
    """Return the findings of a wheel and of each of its binaries."""
    try:
        wheel = wheels.Wheel(path)
    except (OSError, zipfile.BadZipFile) as error:
        return [Finding(path.name, "file", "cannot be read", str(error))]
    findings = list(wheels.check(wheel))
    for binary in wheel.binaries():
        findings += binaries.check(binary)
    return findings


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 1 if one has a problem."""
    findings = [finding for path in args.wheels for finding in audit(path)]
    print("\n".join(lines(findings)))
    missed = sum(bool(finding.problem) for finding in findings)
    print(f"\n{len(findings)} checks, {missed} missed")
    return 1 if missed else 0
