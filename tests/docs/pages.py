"""Blocks of code in the Markdown of this tree, and what a page says of each.

<!-- setup            runs before the blocks that follow, and is not shown: what a reader has already
model = ...
-->

*Not run by the tests of this page: the reason.*       stands before a block that cannot run, for readers too
*Needs the packages `onnx` and `onnxscript`.*          before one that runs where they are installed
<!-- module.name -->                                   before one that docs/triton_code.py writes from the sources
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"])

_PART = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|^(?P<indent> *)```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"\*Not run by the tests of this page: (.+)\.\*$", re.DOTALL)
_NEEDS = re.compile(r"\*Needs the packages? (.+)\.\*$", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block: its language, its code and its line; `not_run` and `needs` as the page says."""

    language: str
    code: str
    line: int
    is_setup: bool = False
    is_generated: bool = False
    not_run: str | None = None
    needs: tuple[str, ...] = ()


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    found = []
    for match in _PART.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["setup"] is not None:
            found.append(Block("python", match["setup"], line, is_setup=True))
            continue
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        not_run, needs = _NOT_RUN.match(before), _NEEDS.match(before)
        packages = tuple(re.findall(r"`([\w-]+)`", needs[1])) if needs else ()
        generated = re.search(r"<!-- \w+\.\w+ -->$", before) is not None
        reason = not_run[1] if not_run else None
        found.append(Block(match["language"], match["code"], line, False, generated, reason, packages))
    return found
