"""The site as far as its sources tell: `nox -s site` builds it, and `nox -s screenshots` looks at it."""

from __future__ import annotations

import importlib.util
import json
import pydoc
import re
from pathlib import Path
from types import ModuleType

import pytest

import fastbn
import fastbn.testing
import fastbn.transforms

DOCS = Path(__file__).resolve().parents[2] / "docs"


def module(name: str) -> ModuleType:
    """Import a module of docs/ by its path: another package may be called docs."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


docstrings, numerics = module("docstrings"), module("numerics")
API = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
MODULES = (fastbn, fastbn.functional, fastbn.testing, fastbn.transforms)


def public_names() -> list[str]:
    """Return the public names, each once: fastbn.convert, not fastbn.transforms.convert too."""
    of_fastbn = {id(getattr(fastbn, name)) for name in fastbn.__all__}
    names = [f"fastbn.{name}" for name in fastbn.__all__ if name != "functional"]
    for module in MODULES[1:]:
        names += [f"{module.__name__}.{name}" for name in module.__all__ if id(getattr(module, name)) not in of_fastbn]
    return names


def documented() -> set[str]:
    return set(re.findall(r"^\.\. auto(?:class|function|data):: ([\w.]+)$", API, re.MULTILINE))


def test_every_public_name_is_documented():
    assert set(public_names()) <= documented()
    assert [name for name in documented() if pydoc.locate(name) is None] == []


def test_every_page_is_in_a_table_of_contents():
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    listed = set()
    for path in DOCS.rglob("*.md"):
        for toctree in re.findall(r"```\{toctree\}\n(?::.*\n)*\n(.*?)```", path.read_text(), re.DOTALL):
            listed |= set(re.findall(r"^(?:.*<)?([\w/]+)>?$", toctree, re.MULTILINE))
    assert pages - listed == {"index"} and listed <= pages


def test_the_tables_of_errors_are_those_of_the_file():
    """`python -m docs.numerics` writes them."""
    page, data = numerics.PAGE.read_text(), json.loads(numerics.FILE.read_text())
    assert numerics.written(page, data) == page
    assert len(data["cases"]) == len(numerics.FULL_CASES)
    changed = page.replace("| bn+relu |", "| bn |", 1)
    assert changed != page and numerics.written(changed, data) == page
    with pytest.raises(ValueError, match="expected the lines"):
        numerics.written("# Numerics", data)


def test_no_measured_error_exceeds_its_bound():
    data = json.loads(numerics.FILE.read_text())
    errors = [error for row in data["cases"] + data["means"] for error in row["errors"].values()]
    assert len(errors) > 100 and all(passed for *_, passed in errors)


def test_docstrings_become_lists():
    text = ["Return x * y, or ``a * b`` and `c_`.", "", "x, y: numbers.", "of any size. z: |z| < 1. Raises ValueError."]
    assert docstrings.marked_up(text, {"x", "y", "z"}) == [
        r"Return x \* y, or ``a * b`` and `c_`.",
        "",
        "- ``x``, ``y``: numbers. of any size.",
        "",
        r"- ``z``: \|z\| < 1.",
        "",
        "Raises ValueError.",
        "",
    ]
    assert docstrings.marked_up(["One.", "", "    code = 1"], set()) == [
        *("One.", "", ".. code-block:: python", "", "    code = 1", "")
    ]


def test_classes_that_differ_by_dimensions_alone_are_short():
    assert docstrings.shortened("fastbn.BatchNorm2d") is None and docstrings.shortened("fastbn.fold") is None
    assert docstrings.shortened("fastbn.MaskedBatchNorm1d") is None
    assert docstrings.shortened("fastbn.BatchNorm3d")[0].startswith(":class:`fastbn.BatchNorm2d`")


@pytest.mark.parametrize("name", sorted(name for name in fastbn.__all__ if docstrings.shortened(f"fastbn.{name}")))
def test_what_is_left_out_is_the_same_text(name):
    """But for the shape of the input, which the short text has, and what only some dimensions allow."""

    def plain(name: str) -> str:
        text = " ".join(getattr(fastbn, name).__doc__.split())
        return re.sub(r"\(N, C[^)]*\)( or \(N, C, L\))?|\b[123]d\b|[123]d(?=\W)", "", text)

    assert plain(name) == plain(f"{name[:-2]}2d")
