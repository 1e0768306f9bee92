"""The examples of docs/variants.md: what they print is what the page says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "variants.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


# The numbers of the others are those of tests beside the tests of what they describe.
WITH_EXAMPLES = [section for section, text in SECTIONS.items() if "\n>>> " in text]


@pytest.mark.parametrize("section", WITH_EXAMPLES)
def test_the_examples_of_a_section(section):
    text = SECTIONS[section]
    test = doctest.DocTestParser().get_doctest(text, {}, section, str(PAGE), 0)
    assert len(test.examples) == text.count("\n>>> ")
    failures = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)
