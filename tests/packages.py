"""Packages that a test may need and fastbn does not: `@needs("timm")` skips the test where timm is not installed.

`pytest -m needs` runs these tests alone. FASTBN_REQUIRE_TOOLS=1 makes a missing package an error where the extra
`tools` of pyproject.toml brings it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# What the extra leaves out; docs/tools.md says why.
LEFT_OUT = {"ultralytics"}


def needs(*packages: str) -> pytest.MarkDecorator:
    """Return the mark of a test that imports these packages, each by the name of its import."""
    return pytest.mark.needs(*packages)


def extra() -> set[str]:
    """Return the packages of the extra `tools` by the names of their imports."""
    (listed,) = re.findall(r"^tools = \[(.*?)\]", PYPROJECT.read_text(), re.MULTILINE | re.DOTALL)
    return {package.replace("-", "_") for package in re.findall(r'"([\w-]+)', listed)}


def require(*packages: str) -> None:
    """Skip the test that is running without one of these packages, or fail where it should be there."""
    known = extra()
    if unknown := sorted(set(packages) - known - LEFT_OUT):
        pytest.fail(f"expected packages of the extra `tools`, got {' and '.join(unknown)}", pytrace=False)
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    wanted = [package for package in missing if package in known]
    if wanted and os.environ.get("FASTBN_REQUIRE_TOOLS") == "1":
        pytest.fail(f"FASTBN_REQUIRE_TOOLS=1, but {' and '.join(wanted)} was not found", pytrace=False)
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
