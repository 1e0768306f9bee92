"""Claims of docs and docstrings about the tree: paths that they name exist, and lists of activations are complete."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import fastbn
from fastbn.ops.activations import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"])
TOP = "csrc fastbn tests bench docs examples .ci .github".split()
# Paths that commands write or find elsewhere.
MADE = {"demo/curves.png"}


def _named(text: str) -> set[str]:
    """Return paths below a folder of the tree, between backticks or as a word of a command."""
    words = re.findall(r"(?<![\w./*-])[\w.-]+(?:/[\w.{},*-]*)+", text)
    return {word.rstrip(".,") for word in words if word.split("/")[0] in TOP and word not in MADE}


def _alternatives(path: str) -> list[str]:
    braces = re.search(r"\{([^}]*)\}", path)
    if braces is None:
        return [path]
    return [path[: braces.start()] + part + path[braces.end() :] for part in braces[1].split(",")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_paths_exist(page):
    missing = [
        path
        for named in _named(page.read_text())
        for path in _alternatives(named)
        if not (any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists())
    ]
    assert not missing


def test_a_path_that_is_gone_is_found():
    assert _named("see `tests/gone.py`, or run python docs/gone.py > x") == {"tests/gone.py", "docs/gone.py"}
    assert _alternatives("csrc/cuda/{device,block}/") == ["csrc/cuda/device/", "csrc/cuda/block/"]


def _dead_links(page: Path, text: str) -> list[str]:
    """Return links of `text` to files that are absent, or to headings that the page they lead to has not."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        target = "".join(link)
        path, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        to = page.parent / path if path else page
        # As on GitHub: in lower case, without punctuation, with hyphens for spaces.
        titles = re.findall(r"^#+ (.+)$", text if to == page else to.read_text(), re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        if not to.exists() or (heading and heading not in slugs):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_tree_lead_somewhere(page):
    assert not _dead_links(page, page.read_text())


def test_a_dead_link_is_found():
    text = '# One, two\n[a](#one-two) [b](#three) [c](gone.md) [d](README.md) <img src="no.svg"> [e](https://a.b/c)'
    assert _dead_links(ROOT / "CHANGELOG.md", text) == ["#three", "gone.md", "no.svg"]


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize(
    "text",
    [
        fastbn.functional.batch_norm.__doc__,
        fastbn.BatchNorm2d.__doc__,
        (ROOT / "README.md").read_text(),
        (ROOT / "docs" / "design.md").read_text(),
    ],
    ids=["batch_norm", "BatchNorm2d", "README", "design"],
)
def test_every_activation_is_named(text, name):
    assert re.search(rf"\b{name}\b", text)


def test_the_code_on_the_page_about_triton_is_that_of_the_kernels():
    """`python docs/triton_code.py` writes it."""
    page = (ROOT / "docs" / "triton.md").read_text()
    code = runpy.run_path(str(ROOT / "docs" / "triton_code.py"))
    assert len(code["BLOCK"].findall(page)) > 15 and page.count("```python") == len(code["BLOCK"].findall(page))
    assert page == code["written"](page)
    assert code["written"](page.replace("def locate", "def misplace")) == page
