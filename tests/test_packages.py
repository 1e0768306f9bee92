"""Packages that tests need and fastbn does not: a missing one is a skip, or an error where it should be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import packages

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_left_out_has_its_reason():
    page = (ROOT / "docs" / "tools.md").read_text()
    assert "torchvision" in packages.extra() and packages.LEFT_OUT.isdisjoint(packages.extra())
    assert all(re.search(rf"{package}[^|]*left out", page, re.DOTALL) for package in packages.LEFT_OUT)


def test_no_test_skips_by_itself():
    """Such a skip would pass where the package should be there."""
    for path in (ROOT / "tests").rglob("*.py"):
        for module in re.findall(r'importorskip\(\s*"([\w.]+)"', path.read_text()):
            assert module.startswith("torch."), f"{path}: expected a mark for {module}"


def test_a_missing_package(monkeypatch):
    monkeypatch.delenv("FASTBN_REQUIRE_TOOLS", raising=False)
    with pytest.raises(pytest.fail.Exception, match="^expected packages of the extra `tools`, got nowhere$"):
        packages.require("nowhere")
    monkeypatch.setattr(packages, "extra", lambda: {"pytest", "nowhere"})
    monkeypatch.setattr(packages, "LEFT_OUT", {"elsewhere"})
    packages.require("pytest")
    with pytest.raises(pytest.skip.Exception, match="^needs nowhere$"):
        packages.require("pytest", "nowhere")
    monkeypatch.setenv("FASTBN_REQUIRE_TOOLS", "1")
    with pytest.raises(pytest.skip.Exception, match="^needs elsewhere$"):
        packages.require("elsewhere")
    with pytest.raises(pytest.fail.Exception, match="^FASTBN_REQUIRE_TOOLS=1, but nowhere was not found$"):
        packages.require("elsewhere", "nowhere")
