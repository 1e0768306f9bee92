"""The fast tier leaves out no file, and no mark is misspelt."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
# Files with no test in the fast tier, and why.
SLOW = {
    "ops/test_large.py": "more than 2^31 elements",
    "ops/test_out_of_memory.py": "a process of its own, which takes a minute",
}


def _is_slow(test: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) in ("pytest.mark.slow", "pytest.mark.gpu") for decorator in test.decorator_list)


@pytest.mark.parametrize("file", FILES)
def test_every_file_has_a_test_in_the_fast_tier(file):
    body = ast.parse((TESTS / file).read_text()).body
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert tests and all(map(_is_slow, tests)) == (file in SLOW)


def test_marks_are_registered(pytestconfig):
    """A misspelt mark would leave its test in the tier that it is too slow for."""
    assert pytestconfig.getoption("strict_markers")
    assert any(line.startswith("slow:") for line in pytestconfig.getini("markers"))
