"""Trying a wheel: what is wrong with planted ones, whose torch is a stand-in, is in the row."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from release import attempt
from tests.release.test_wheels import INFO, plant

NAME = "fastbn-1.0-py3-none-any.whl"
PACKAGE = """
def command():
    import json, pathlib, sys
    {leave}
    print(json.dumps({{"torch": "2.13.0", "runs here": {{"C++ autograd node": "no: not built"}}}}))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A function that writes a wheel whose command ends with one more statement, and a torch without anything."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").touch()
    monkeypatch.setattr(attempt, "WHERE", f"print({str(tmp_path / 'site')!r})")
    monkeypatch.setattr(attempt, "STEP", "import fastbn")

    def write(leave: str = ""):
        files = {
            "fastbn/__init__.py": PACKAGE.format(leave=leave).encode(),
            f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: fastbn\nVersion: 1.0\n",
            f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{INFO}/entry_points.txt": b"[console_scripts]\nfastbn = fastbn:command\n",
        }
        return plant(tmp_path, files, NAME)

    return write


def tried(path) -> attempt.Row:
    return attempt.attempt(path, sys.executable, None, site_packages=True)


@pytest.mark.slow
def test_a_good_wheel(stub):
    row = tried(stub())
    assert row.is_good() and (row.torch, row.node) == ("2.13.0", "no") and row.how != "none", row


@pytest.mark.slow
def test_what_a_wheel_leaves(stub):
    row = tried(stub("pathlib.Path(__file__).with_name('cache').touch()"))
    assert row.info == "ok" and "Errno" in row.read_only and not row.is_good(), row
    assert row.uninstall.startswith("left ") and "fastbn" in row.uninstall
    row = tried(stub("pathlib.Path.home().joinpath('cache').touch()"))
    assert row.uninstall.startswith("left ") and row.uninstall.endswith("/home/cache")


@pytest.mark.slow
def test_a_command_that_fails(stub, capsys):
    path = stub("sys.exit('fastbn: why')")
    arguments = SimpleNamespace(wheel=path, python=sys.executable, torch=None, site_packages=True, json=False)
    assert attempt.run(arguments) == 1
    assert "verify     exit status 1: fastbn: why\ntraining   ok\n" in capsys.readouterr().out


def test_the_ways_to_forbid_writing(tmp_path):
    """The first that works is taken; as root, permissions forbid nothing."""
    tmp_path.chmod(0o755)
    names = [name for name, _ in attempt.read_only_wrappers(tmp_path)]
    assert names == (["a read-only mount", "another user"] if os.geteuid() == 0 else ["permissions"])
    writes = [sys.executable, "-S", "-c", f"open({str(tmp_path / 'written')!r}, 'w')"]
    failed = [subprocess.run([*wrapper, *writes]).returncode for _, wrapper in attempt.read_only_wrappers(tmp_path)]
    assert os.geteuid() != 0 or any(failed)


def test_a_row_is_good_only_if_every_part_is():
    parts = ("install", "info", "verify", "training", "read_only", "uninstall")
    good = dict.fromkeys(parts, "ok")
    assert attempt.Row("a", **good).is_good()
    assert not any(
        attempt.Row("a", **(good | {part: bad})).is_good() for part in parts for bad in ("", "exit status 1")
    )
