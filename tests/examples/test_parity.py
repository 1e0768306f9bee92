"""examples/parity.py: torch's layer passes, and the two kernels with a mistake fail where their docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_passes_and_fails_as_it_says():
    options = ["-p", "fastbn.testing.fixtures", "-p", "no:cacheprovider", "-rA", "--tb=line"]
    command = [sys.executable, "-m", "pytest", *options, "examples/parity.py"]
    command += ["-k", "(torch and f32) or (one_sweep and f32-train and (rgb or steep)) or (biased and prime)"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    outcomes = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) \S+::(\S+)", shown, re.MULTILINE)}
    of_torch = [outcome for name, outcome in outcomes.items() if name.startswith("test_torch")]
    assert len(of_torch) > 50 and set(of_torch) == {"PASSED"}, shown
    of_sweep = {name: outcome for name, outcome in outcomes.items() if name.startswith("test_one_sweep")}
    assert len(of_sweep) == 4
    assert all((outcome == "FAILED") == ("steep" in name) for name, outcome in of_sweep.items()), shown
    assert {outcome for name, outcome in outcomes.items() if name.startswith("test_biased")} == {"FAILED"}
    assert "OneSweepBatchNorm2d on steep-4x7x9x9-offset-f32-train, cpu:" in shown
    assert "biased_batch_norm on prime-7x13-f32-train, cpu:" in shown
