"""docs/tools.md and the tests that it names: each is there, and none in this folder is missing from the page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = r"`(tests/[\w/]+\.py)::(\w+)`"


def _rows() -> list[str]:
    lines = (ROOT / "docs" / "tools.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith("| tool |")]


def test_every_row_has_a_test():
    rows = _rows()
    assert len(rows) >= 40
    for row in rows:
        named = re.findall(NAMED, row)
        assert named, row
        for path, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{test}"


def test_every_test_of_tools_is_in_the_table():
    text = (ROOT / "docs" / "tools.md").read_text()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != Path(__file__).name:
            for test in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
                assert f"`tests/tools/{path.name}::{test}`" in text, f"{path.name}::{test}"
