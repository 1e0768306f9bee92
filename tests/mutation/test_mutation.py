"""The list of mutants fits the tree: a fault that can no longer be planted would count as one that nobody tried."""

from __future__ import annotations

import shlex

import pytest

from tests.mutation.__main__ import BUILD, parse
from tests.mutation.mutants import GROUPS, ROOT, load

MUTANTS, SELECTIONS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    text = (ROOT / mutant.path).read_text()
    assert text.count(mutant.old) == 1, f"expected the old text once in {mutant.path}:\n{mutant.old}"
    assert mutant.apply(text) != text
    assert mutant.why and mutant.tests in SELECTIONS


def test_names_tell_mutants_apart():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.path, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_every_part_of_the_tree_has_mutants():
    assert {mutant.group for mutant in MUTANTS} == set(GROUPS)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_of_tests_that_exist(name):
    """Whether -k selects any of them is seen when they run: pytest then reports an error."""
    assert any(mutant.tests == name for mutant in MUTANTS)
    assert set(SELECTIONS[name].builds) <= set(BUILD)
    for arguments in SELECTIONS[name].tests:
        files = [argument for argument in shlex.split(arguments) if argument.startswith("tests/")]
        assert files and all((ROOT / file).is_file() for file in files)


def test_arguments():
    assert parse(["--only", "a", "b", "--jobs", "2"]).only == ["a", "b"]
    with pytest.raises(SystemExit):
        parse(["--group", "kernels"])
