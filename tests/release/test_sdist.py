"""The source distribution has every file of the clone, those that only tests need among them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_source_distribution_has_every_file(tmp_path):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a clone, to know what belongs to it")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    # In a fresh folder: setuptools also takes what an older egg-info lists.
    command = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("fastbn-*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted({name for name in tracked if name and (ROOT / name).exists()} - packed) == []
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]
