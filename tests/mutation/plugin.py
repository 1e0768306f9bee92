"""A pytest plugin that writes which test functions failed, one line of JSON each, and does not repeat them.

A function that failed on an implementation is not run again on it with other parameters; after `--enough` functions
pytest stops.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, required=True, help="the file to write")
    parser.addoption("--enough", type=int, default=0, help="functions that fail before pytest stops; 0: all")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Failures(config.getoption("failures"), config.getoption("enough")))


def _place(item: pytest.Item) -> tuple[str, str]:
    """Return (file::function, implementation); the latter is "" for a test without one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    implementation = next((parameters[name] for name in ("ops", "backend", "registered") if name in parameters), "")
    return item.nodeid.split("[")[0], implementation if isinstance(implementation, str) else ""


class _Failures:
    def __init__(self, path: Path, enough: int) -> None:
        self.path, self.enough = path, enough
        self.places: set[tuple[str, str]] = set()

    def _write(self, function: str, implementation: str, test: str = "") -> None:
        if (function, implementation) not in self.places:
            self.places.add((function, implementation))
            with self.path.open("a") as file:
                print(json.dumps([function, implementation, test]), file=file)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if _place(item) in self.places:
            pytest.skip("has failed with other parameters")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if report.failed:
            self._write(*_place(item), item.nodeid)
            if self.enough and len({function for function, _ in self.places}) >= self.enough:
                item.session.shouldstop = "enough functions failed"
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(f"{report.nodeid} (collection)", "")
