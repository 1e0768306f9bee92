"""Reads mutants.toml: what to change, why it would be a fault, and which tests to run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest needs it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.toml")
GROUPS = {
    "python": "fastbn/",
    "math": "csrc/math/",
    "plan": "csrc/plan/",
    "cpu": "csrc/cpu/",
    "bindings": "csrc/bindings/",
    "cuda": "csrc/cuda/",
}


@dataclass(frozen=True)
class Selection:
    """Runs of pytest, as arguments, and the builds that they need: "extension", "emulator"."""

    builds: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    why: str
    tests: str  # the name of a selection

    @property
    def group(self) -> str:
        return next(group for group, folder in GROUPS.items() if self.path.startswith(folder))

    def apply(self, text: str) -> str:
        """Return the text with the fault in it. Raises ValueError if the old text is not there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: expected the old text once in {self.path}, got it {count} times")
        return text.replace(self.old, self.new)


def load() -> tuple[list[Mutant], dict[str, Selection]]:
    listed = tomllib.loads(LIST.read_text())
    selections = {
        name: Selection(tuple(selection["builds"]), tuple(selection["tests"]))
        for name, selection in listed["selections"].items()
    }
    return [Mutant(**mutant) for mutant in listed["mutant"]], selections
