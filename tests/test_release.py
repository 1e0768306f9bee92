"""The version, the changelog and the tags say the same, as CONTRIBUTING.md describes under "How to release"."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?P<date>.*)$", re.MULTILINE)
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def disagreements(version: str, changelog: str, tags: list[str]) -> list[str]:
    """Return a sentence for each rule that is broken."""
    headings = [(match["name"], match["date"]) for match in HEADING.finditer(changelog)]
    unreleased = [index for index, (name, _) in enumerate(headings) if name == "Unreleased"]
    dates = {name: date for name, date in headings if name != "Unreleased"}
    found = [f"expected a version X.Y.Z, got {each}" for each in (version, *dates) if not VERSION.fullmatch(each)]
    found += [f"expected tags vX.Y.Z, got {tag}" for tag in tags if not VERSION.fullmatch(tag.removeprefix("v"))]
    if found:
        return found
    if unreleased not in ([], [0]):
        found.append("expected [Unreleased] once and first")
    for name, date in dates.items():
        if not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date):
            found.append(f"expected [{name}] - YYYY-MM-DD, got [{name}]{date}")
    releases = list(dates)
    if releases != sorted(releases, key=_key, reverse=True):
        found.append("expected the newest version first")
    newest = releases[0] if releases else None
    if newest is None or unreleased:
        if newest is not None and _key(version) <= _key(newest):
            found.append(f"expected a version above {newest} while [Unreleased] is open, got {version}")
    elif version != newest:
        found.append(f"expected the version {newest} of the newest heading, got {version}")
    tagged = {tag.removeprefix("v") for tag in tags}
    # The commit of a release comes before its tag.
    untagged = [name for name in releases if name not in tagged and not (name == newest and not unreleased)]
    found += [f"expected a tag v{name} of [{name}], got none" for name in untagged]
    found += [f"expected a heading of the tag v{name}, got none" for name in sorted(tagged - set(releases))]
    return found


def test_version_changelog_and_tags_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert HEADING.search(changelog)
    assert not disagreements(fastbn.__version__, changelog, _tags())


def _tags() -> list[str]:
    """Return the clone's tags that begin with v, or none where this is no clone, or one without tags."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return []
    listed = subprocess.run(["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


OPEN, FIRST, SECOND = "## [Unreleased]\n", "## [0.1.0] - 2026-12-01\n", "## [0.2.0] - 2027-01-02\n"


@pytest.mark.parametrize(
    ("version", "changelog", "tags"),
    [
        ("0.1.0", OPEN, []),
        ("0.1.0", FIRST, []),
        ("0.1.0", FIRST, ["v0.1.0"]),
        ("0.1.1", OPEN + FIRST, ["v0.1.0"]),
        ("0.2.0", SECOND + FIRST, ["v0.1.0", "v0.2.0"]),
    ],
    ids=["before the first", "release commit", "tagged", "next is open", "second"],
)
def test_right_ones_pass(version, changelog, tags):
    assert not disagreements(version, changelog, tags)


@pytest.mark.parametrize(
    ("version", "changelog", "tags", "said"),
    [
        ("0.1.0", OPEN + FIRST, ["v0.1.0"], "a version above 0.1.0"),
        ("0.2.0", FIRST, [], "the version 0.1.0"),
        ("0.1.0.dev1", OPEN, [], "X.Y.Z, got 0.1.0.dev1"),
        ("0.2.0", OPEN + FIRST, [], "a tag v0.1.0"),
        ("0.2.0", OPEN, ["v0.1.0"], "a heading of the tag v0.1.0"),
        ("0.2.0", OPEN, ["v1-beta"], "tags vX.Y.Z, got v1-beta"),
        ("0.2.0", FIRST + SECOND, ["v0.1.0"], "the newest version first"),
        ("0.2.0", FIRST + OPEN, ["v0.1.0"], "once and first"),
        ("0.1.0", "## [0.1.0]\n", [], "YYYY-MM-DD"),
    ],
    ids=["not raised", "other version", "suffix", "no tag", "no heading", "odd tag", "order", "open below", "no date"],
)
def test_wrong_ones_are_told(version, changelog, tags, said):
    assert any(said in each for each in disagreements(version, changelog, tags))
