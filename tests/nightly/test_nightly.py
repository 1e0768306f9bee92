"""The nightly run: no part passes that has run nothing, and CONTRIBUTING.md has the table of the kept results."""

from __future__ import annotations

import ast

import pytest

from tests.nightly import record
from tests.nightly.parts import PARTS

BY_NAME = {part.session: part for part in PARTS}
RUN = {
    "fuzz": "seed 7: python -m tests.fuzz --cases 12 --seed 7\n\n12 cases in 3 s (2 s of CPU), 0 kinds of fault\n",
    "threads": "100% tests passed, 0 tests failed out of 6\n",
    "bindings": "instruction set avx2\nthe planted overrun was reported\n.....\n12 passed, 3 skipped in 4.00s\n",
    "large": "..\n2 passed, 2 deselected in 90.00s\n",
}
COUNTS = {"fuzz": 12, "threads": 6, "bindings": 12, "large": 2}
WHERE = {
    "date": "2026-11-30T03:00:00+00:00",
    "revision": "0123456789abcdef",
    "modified": False,
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 24,
    "python": "3.11.2",
    "torch": "2.13.0",
    "compiler": "g++ 12",
}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_part_passes_only_if_it_ran(name):
    part = BY_NAME[name]
    assert (part.outcome(0, RUN[name]), part.count(RUN[name])) == ("passed", COUNTS[name])
    assert part.outcome(1, RUN[name]) == "failed"
    assert part.outcome(0, "") == "failed"


def test_programs_are_counted_as_ctest_4_reports_them():
    part = BY_NAME["threads"]
    assert part.count("100% tests passed out of 6\n") == 6
    assert part.count("83% tests passed, 1 tests failed out of 6\n") == 0


def test_a_part_that_skips_its_tests_is_skipped():
    assert BY_NAME["large"].outcome(0, "ss\n2 skipped, 2 deselected in 1.00s\n") == "skipped"


def test_parts_are_sessions_of_nox():
    tree = ast.parse((record.ROOT / "noxfile.py").read_text())
    assert set(BY_NAME) < {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_new_result_replaces_the_old_one_of_its_part(tmp_path):
    file = tmp_path / "results.json"
    large, fuzz = (record.result(BY_NAME[name], 0, RUN[name], 3.4, WHERE) for name in ("large", "fuzz"))
    record.save([large], file)
    record.save([fuzz], file)
    failed = {**large, "outcome": "failed"}
    assert record.save([failed], file) == record.load(file) == [fuzz, failed]


def test_the_table_has_a_row_for_each_result_and_each_machine_once():
    results = [record.result(part, 0, RUN[part.session], 3.4, WHERE) for part in PARTS]
    results[0]["cores"] = 64
    table = record.table(results)
    assert "| 12 cases | passed (seed 7) | 3 s | 2026-11-30 | 0123456789 |" in table
    assert [table.count(f"| `{name}` |") for name in BY_NAME] == [1] * len(PARTS)
    assert table.count("a processor with 2 cores") == table.count("a processor with 64 cores") == 1


def test_the_page_has_the_table_of_the_kept_results():
    page = record.PAGE.read_text()
    assert page.count(record.BEGIN) == page.count(record.END) == 1
    assert record.with_table(page, record.load()) == page
