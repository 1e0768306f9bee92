"""The marks of hot loops in kernel sources.

    // hot loop: sums
    ...
    // end of hot loop

The lines between the two comments are hot, in whatever file they stand: an instruction is hot if its own line, or any
line that it was inlined into, lies there. So the comments may enclose the body of a loop, a call of a function that is
inlined into it, or the body of that function. What runs once per chunk (waiting for a barrier, passing a slot on, the
vectors left over after whole chunks) stays outside of them, and code inside of them that a steady state does not enter
stands between `// cold path` and `// end of cold path`. Several places may have the same name; marks do not nest,
except that a cold path may lie in a hot loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MARK = re.compile(
    r"^\s*// (?:hot loop: (?P<hot>[a-z][a-z_ ]*[a-z])|(?P<cold>cold path)|end of (?P<end>hot loop|cold path))$"
)
SUFFIXES = (".cu", ".cuh", ".h", ".inl")


@dataclass(frozen=True)
class Mark:
    """Lines `first` to `last` of a file, counted from 1. `name` is None for a cold path."""

    file: str
    first: int
    last: int
    name: str | None


def marks_of(text: str, file: str) -> list[Mark]:
    """Return the marks in a source. Raises ValueError for one that is not closed, or closed without being open."""
    marks, open_marks = [], []
    for number, line in enumerate(text.splitlines(), 1):
        match = _MARK.match(line)
        if match is None:
            if re.search(r"//\s*(hot loop|end of hot loop|cold path|end of cold path)\b", line):
                raise ValueError(f"{file}:{number}: expected a mark alone on its line, got {line.strip()!r}")
            continue
        if match["end"] is None:
            if len(open_marks) > (match["cold"] is not None):
                raise ValueError(f"{file}:{number}: the mark of line {open_marks[-1][0]} is still open")
            open_marks.append((number, match["hot"]))
            continue
        kind = "hot loop" if open_marks and open_marks[-1][1] else "cold path"
        if not open_marks or kind != match["end"]:
            raise ValueError(f"{file}:{number}: no {match['end']} is open")
        first, name = open_marks.pop()
        marks.append(Mark(file, first + 1, number - 1, name))
    if open_marks:
        raise ValueError(f"{file}:{open_marks[-1][0]}: the mark is never closed")
    return marks


def find_marks(root: Path) -> list[Mark]:
    """Return the marks in all sources below `root`. Files are named relative to it."""
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    return [mark for path in files for mark in marks_of(path.read_text(), path.relative_to(root).as_posix())]
