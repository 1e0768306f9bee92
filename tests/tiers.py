"""The fast tier, `pytest -m "not slow"`, to be run before each commit: what it takes of a table of cases.

It takes four minutes on two idle cores, beside builds, and is to take no more. A test is marked slow where it stands,
by what `--durations=0` says of it; every file keeps some test in the fast tier (tests/test_tiers.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from fastbn.testing.cases import SMALL_NUMEL, Case


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """Return the mark of a case that is too large for the fast tier, or none."""
    return [pytest.mark.slow] if case.numel > SMALL_NUMEL else []


def params(cases: Iterable[Case]) -> list:
    """Return `cases` to parametrise a test with, the larger ones marked slow."""
    return [pytest.param(case, id=str(case), marks=marks(case)) for case in cases]
