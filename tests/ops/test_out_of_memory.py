"""Runs tests/ops/out_of_memory.py in a process of its own.

The heap of a process that ran other tests has room to spare, which a limit on new memory does not take away.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not gpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_out_of_memory(which):
    selected = ["-m", which, "tests/ops/out_of_memory.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
