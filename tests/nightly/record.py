"""Keeps the last outcome of each part in results.json, and the table of them in CONTRIBUTING.md."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch

from bench import machine
from tests.nightly.parts import PARTS, Part

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- written by python -m tests.nightly -->\n", "<!-- end -->\n"


def surroundings() -> dict:
    """Return the date, the revision, the machine and the versions of a run, flat."""
    known = machine.machine(torch.device("cpu"))
    names = "date", "revision", "modified", "cpu", "cores", "instruction_set", "python", "torch", "fastbn"
    return {**{name: known[name] for name in names}, "memory_gib": _memory_gib(), "compiler": _compiler()}


def result(part: Part, status: int, output: str, seconds: float, where: dict) -> dict:
    """Return what is kept of a run of a part."""
    return {
        "session": part.session,
        "outcome": part.outcome(status, output),
        "count": part.count(output),
        "unit": part.unit,
        "seconds": round(seconds),
        "note": part.note(output),
        **where,
    }


def load(file: Path = RESULTS) -> list[dict]:
    """Return the kept results, in the order of the parts."""
    return json.loads(file.read_text()) if file.exists() else []


def save(new: list[dict], file: Path = RESULTS) -> list[dict]:
    """Replace the results of the parts that ran; returns all results."""
    kept = {entry["session"]: entry for entry in [*load(file), *new]}
    results = [kept[part.session] for part in PARTS if part.session in kept]
    file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def table(results: list[dict]) -> str:
    """Write the results as a Markdown table, and below it the machines."""
    if not results:
        return "None ran yet.\n"
    what = {part.session: part.what for part in PARTS}
    lines = ["| session | what it checks | ran | outcome | time | date | revision |", "|---|---|---|---|---|---|---|"]
    machines: list[str] = []
    for entry in results:
        described = _describe(entry)
        if described not in machines:
            machines.append(described)
        outcome = entry["outcome"] + (f" ({entry['note']})" if entry["note"] else "")
        revision = entry["revision"][:10] + (" and changes" if entry["modified"] else "")
        ran, seconds = f"{entry['count']} {entry['unit']}", f"{entry['seconds']} s"
        cells = f"`{entry['session']}`", what[entry["session"]], ran, outcome, seconds, entry["date"][:10], revision
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"They ran on: {'; '.join(machines)}.", ""])


def with_table(page: str, results: list[dict]) -> str:
    """Return the page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def _describe(entry: dict) -> str:
    return (
        f"{entry['cpu']} with {entry['cores']} cores and {entry['memory_gib']} GiB, Python {entry['python']}, "
        f"torch {entry['torch']}, {entry['compiler']}"
    )


def _memory_gib() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return round(int(lines[0].split()[1]) / 2**20)


def _compiler() -> str:
    version = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    return version.splitlines()[0]
