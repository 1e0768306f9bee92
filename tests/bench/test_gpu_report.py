"""bench/gpu_report.sh without a GPU: its time, and that a step that fails or hangs loses no other's result."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_report.sh"

# In place of Python: the extension does not build, the tests hang after the first, and the others do as asked.
PYTHON = """#!/bin/bash
case "$*" in
  *setup.py*) echo "no compiler"; exit 3 ;;
  *tests/ops/test_ops.py*) echo "7 passed" ;;
  *"-m pytest"*) echo "test_first PASSED"; exec sleep 600 ;;
  *"-m bench.model"*) echo "launch_us 3.5" ;;
  *"-m bench.plan_shares"*) echo "stream 0.9" ;;
  *"-m bench "*)
    while [ "$1" != --json ]; do shift; done
    echo '{"measurements": []}' > "$2"
    mkdir -p "$4" && echo "# report" > "$4/report.md"
    echo "fastbn is faster" ;;
  *) echo "python 3, torch 2" ;;
esac
"""
# In place of bench/plans.cu and of visit.cu: the check finds a plan that hangs, the times end with a failure.
PROGRAM = """#!/bin/bash
case "$*" in
  *--check*) echo "3,8,64,stream,hang"; echo "5 plans are right, 0 wrong, 0 failed, 1 hung" >&2; exit 1 ;;
  "") echo "bytes,copy_us"; echo "100,3" ;;
  *) echo "outer,channels,us"; echo "128,256,40"; exit 4 ;;
esac
"""
# In place of nvcc: writes that program. compute-sanitizer finds nothing; ncu does not know a metric.
NVCC = """#!/bin/bash
[ "$1" = --version ] && exec echo "nvcc 13"
while [ "$1" != -o ]; do shift; done
cp "$PROGRAM" "$2"
"""
SANITIZER = """#!/bin/bash
echo "========= ERROR SUMMARY: 0 errors"
"""
NCU = """#!/bin/bash
case "$*" in *--metrics*) echo "==ERROR== no such metric"; exit 1 ;; esac
echo "==PROF== Connected"; echo '"0","stream_forward_kernel","42"'
"""
TOOLS = {"python": PYTHON, "program": PROGRAM, "nvcc": NVCC, "compute-sanitizer": SANITIZER, "ncu": NCU}


def environment(folder: Path, **given: str) -> dict[str, str]:
    for name, text in TOOLS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "visit.cu").touch()
    paths = {"TMPDIR": folder, "OUT": folder / "out", "PYTHON": folder / "python", "PROGRAM": folder / "program"}
    paths |= {"VISIT": folder, "PATH": f"{folder}:{os.environ['PATH']}"}
    return {**os.environ, **{name: str(path) for name, path in paths.items()}, "DEVICE": "cpu", **given}


def outcomes_of(folder: Path) -> dict[str, str]:
    """Return the outcome of each step that the summary names."""
    summary = (folder / "out" / "summary.txt").read_text()
    return dict(re.findall(r"^(\w+) +(\S.*?) +\d+ s$", summary, re.MULTILINE))


def run(folder: Path, **given: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    command = ["bash", str(SCRIPT)]
    result = subprocess.run(command, env=environment(folder, **given), capture_output=True, text=True, timeout=120)
    return result, outcomes_of(folder)


def limits() -> dict[str, int]:
    return {name: int(limit) for name, limit in re.findall(r"^step (\w+) (\d+)$", SCRIPT.read_text(), re.MULTILINE)}


def test_the_limits_of_the_steps_fit_eight_minutes_and_are_those_of_the_head():
    assert sum(limits().values()) <= 480
    head = re.findall(r"^#   (\w+) +(\d+) s  ", SCRIPT.read_text(), re.MULTILINE)
    assert {name: int(limit) for name, limit in head} == limits()


def test_a_step_that_fails_or_hangs_loses_no_other(tmp_path):
    result, outcomes = run(tmp_path, LIMIT_tests="2")
    assert result.returncode == 1, result.stderr
    assert list(outcomes) == [*limits(), "racecheck"]
    failures = {"check": "FAILED (1)", "build": "FAILED (3)", "plans": "FAILED (4)", "tests": "out of time"}
    assert outcomes == {**dict.fromkeys(outcomes, "ok"), **failures, "refit": outcomes["refit"]}
    out = tmp_path / "out"
    machine, *rows = (out / "plans.csv").read_text().splitlines()
    assert machine.startswith("# ") and "python 3, torch 2" in machine and rows == ["outer,channels,us", "128,256,40"]
    assert (out / "visit.csv").read_text().splitlines() == ["bytes,copy_us", "100,3"]
    assert (out / "ncu.csv").read_text().splitlines() == ['"0","stream_forward_kernel","42"'] * 3
    assert (out / "results.json").exists() and (out / "report.tar.gz").exists()
    log = (out / "log.txt").read_text()
    for text in (
        "no compiler",
        "3,8,64,stream,hang",
        "7 passed",
        "test_first PASSED",
        "stream 0.9",
        "fastbn is faster",
    ):
        assert text in log
    summary = result.stdout.partition("==== summary")[2]
    assert "1 hung" in summary and "test_first PASSED" in summary and "fastbn is faster" in summary
    assert len([path for path in out.iterdir()]) <= 8


def test_what_was_done_is_there_while_a_step_runs(tmp_path):
    command, given = ["bash", str(SCRIPT)], environment(tmp_path, LIMIT_tests="5")
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("== tests"):
                assert "7 passed" in (tmp_path / "out" / "log.txt").read_text()
                assert outcomes_of(tmp_path)["parity"] == "ok"
                break
        else:
            pytest.fail("the script did not get to the tests")
        process.kill()


def test_steps_that_have_no_time_are_left_out(tmp_path):
    _, outcomes = run(tmp_path, SECONDS_IN_ALL="4")
    assert set(outcomes.values()) == {"left out: no time"}


def test_what_is_absent_is_left_out_with_a_reason(tmp_path):
    absent = str(tmp_path / "absent")
    _, outcomes = run(tmp_path, LIMIT_tests="1", PLANS=absent, VISIT=absent)
    for step in ("check", "plans", "memcheck", "counters", "racecheck"):
        assert outcomes[step] == "left out: bench/plans.cu was not built"
    assert outcomes["visit"] == f"left out: no {absent}/visit.cu"
