"""`fastbn bench --shape N,C,...`: what it prints and takes, and that it needs fastbn and torch alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbn
from fastbn.cli import main, one_shape
from fastbn.measure.implementations import implementations
from fastbn.measure.one_shape import MIN_ROUNDS
from fastbn.nn.batchnorm import FastBatchNorm
from tests.cli.test_misuse import misuse

pytestmark = pytest.mark.usefixtures("one_thread")
BRIEF = ["bench", "--device", "cpu", "--seconds", "0.01"]


def measured(arguments, capsys) -> dict:
    assert main([*BRIEF, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_record(capsys):
    record = measured(["--shape", "4,6,5,7", "--dtype", "bf16", "--op", "train_backward+add+relu"], capsys)
    assert (record["shape"], record["dtype"], record["layout"]) == ([4, 6, 5, 7], "bfloat16", "contiguous")
    size = 4 * 6 * 5 * 7 * 2
    assert (record["tensor_bytes"], record["floor_bytes"]) == (size, 7 * size + 2 * size // 16)
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["fastbn"] == fastbn.__version__
    stock, fast = record["timings"]
    assert (stock["implementation"], fast["implementation"]) == ("torch", "fastbn")
    assert stock["speedup"] is None and fast["speedup_p20"] <= fast["speedup"] <= fast["speedup_p80"]
    for each in (stock, fast):
        assert each["p20_us"] <= each["median_us"] <= each["p80_us"] and each["rounds"] >= MIN_ROUNDS
        assert each["gb_per_s"] == pytest.approx(record["floor_bytes"] / each["median_us"] / 1e3)
        assert each["copy_share"] == pytest.approx(each["gb_per_s"] / record["copy_gb_per_s"])
    assert [each["implementation"] for each in record["refused"]] == ["onednn"]
    assert record["plans"]["backward"]["fused"] == "addition and relu"


def test_what_is_printed(capsys, tmp_path):
    path = tmp_path / "new" / "run.json"
    assert main([*BRIEF, "--shape", "3x4x5x6", "--layout", "channels_last", "--op", "eval", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("eval of 3x4x5x6 float32 channels_last\n")
    assert "torch's time over it" in printed and "fastbn's forward: cpu: row_tiles" in printed
    assert "Agreed with float64 before it was timed: torch, fastbn. Rounds: " in printed and "backward" not in printed
    assert json.loads(path.read_text())["format"] == "fastbn bench shape 1"


@pytest.mark.parametrize("spelling", ["bfloat16", "bf16", "torch.bfloat16", "half", "fp16", "float", "fp32", "float32"])
def test_spellings_of_dtypes(capsys, spelling):
    assert main(["bench", "--shape", "4,6", "--dtype", spelling, "--list"]) == 0
    name = {"b": "bfloat16", "t": "bfloat16", "h": "float16"}.get(
        spelling[0], "float16" if "16" in spelling else "float32"
    )
    assert capsys.readouterr().out == f"shape-4x6 {name} train_backward\n"


@pytest.mark.parametrize("shape", ["4,6,5,7", "4x6x5x7"])
@pytest.mark.parametrize("op", ["train", "frozen+gelu"])
def test_names_of_what_is_measured(capsys, shape, op):
    assert main(["bench", "--shape", shape, "--op", op, "--list"]) == 0
    assert capsys.readouterr().out == f"shape-4x6x5x7 float32 {op}\n"


def test_channels_last_of_five_sizes(capsys):
    assert main(["bench", "--shape", "2,3,4,5,6", "--layout", "channels_last", "--list"]) == 0
    assert capsys.readouterr().out == "shape-2x3x4x5x6-channels_last_3d float32 train_backward\n"


def test_with_a_suite_a_shape_is_a_pattern(capsys):
    listed = []
    for shape in ("16x64x56x56", "16,64,56,56", "16x64x56*,1x2"):
        assert (
            main(
                [
                    "bench",
                    "--suite",
                    "quick",
                    "--device",
                    "cpu",
                    "--part",
                    "layers",
                    "--dtype",
                    "bf16",
                    "--shape",
                    shape,
                    "--list",
                ]
            )
            == 0
        )
        listed.append(capsys.readouterr().out.splitlines())
    assert listed[0] == listed[1] == listed[2]
    assert listed[0][0] == "copy" and {line.split()[1] for line in listed[0][1:]} == {"bfloat16"}


def test_an_implementation_by_name(capsys):
    record = measured(["--shape", "8,3", "--implementation", "fastbn"], capsys)
    assert [each["implementation"] for each in record["timings"]] == ["fastbn"]
    assert record["timings"][0]["speedup"] is None


def test_a_wrong_result_is_not_timed_and_fails(capsys, monkeypatch):
    right = FastBatchNorm.forward
    monkeypatch.setattr(FastBatchNorm, "forward", lambda self, *args: right(self, *args) * 1.01)
    assert main([*BRIEF, "--shape", "8,3"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: fastbn: output: got " in printed and "timed: torch. " in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--shape", "16"], "--shape: expected one shape of 2 to 5 sizes and more than one value per channel"),
        (["--shape", "1,64,1,1"], "--shape: expected one shape"),
        (["--shape", "4,0,5"], "--shape: expected one shape"),
        (["--shape", "16x64x*"], "--shape: expected one shape"),
        (["--shape", "4x3,8x3"], "--shape: expected one shape"),
        (["--shape", "4,3,2,2,2,2"], "--shape: expected one shape"),
        (["--shape", "4,-3"], "--shape: expected one shape"),
        (["--shape", "4,3", "--dtype", "float64"], "--dtype: expected one of bfloat16, bf16, "),
        (["--shape", "4,3", "--dtype", "bf16,fp16"], "--dtype: expected one beside --shape"),
        (["--shape", "4,3", "--layout", "channels_last"], "--layout: expected contiguous for a shape of 2 sizes"),
        (["--shape", "4,3", "--op", "train*"], "--op: expected one of train, "),
        (["--shape", "4,3", "--implementation", "apex"], "--implementation: expected some of torch, "),
        (["--shape", "4,3", "--case", "lenet"], "--case: expected --suite beside it"),
        (["--shape", "4,3", "--time-limit", "0"], "--time-limit: expected --suite beside it"),
        (["--shape", "4,3", "--list", "--json", "a"], "--json: expected no --list beside it"),
        (["--suite", "quick", "--list", "--json", "a"], "--json: expected no --list beside it"),
        (
            ["--shape", "4,3", "--op", "train", "--op", "eval"],
            "fastbn bench: error: argument --op: expected it once, got train and eval",
        ),
        (
            ["--suite", "quick", "--dtype", "bf16", "--dtype", "half,float"],
            "fastbn bench: error: argument --dtype: expected it once, got bf16 and half,float",
        ),
        (["--shape", "4,3", "--against-itself"], "--against-itself: expected --suite beside it"),
        (["--shape", "4,3", "--compare", "old.json"], "--compare: expected --suite beside it"),
        (["--suite", "quick", "--json"], "--json: expected a file beside a suite, got none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(one_shape, "measure_shape", lambda *_: pytest.fail("something was measured"))
    assert misuse(["bench", *arguments], capsys).startswith(said)


def test_what_needs_more_memory_than_there_is_says_so(capsys):
    assert main([*BRIEF, "--shape", "1000000000,1000000"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("--shape: cannot measure shape-1000000000x1000000 ") and said.count("\n") == 1


def test_compilers_take_part_only_by_name():
    known = implementations(torch.device("cpu"))
    assert {rival.name for rival in known if rival.compiles} == {"compile", "compile-max-autotune"}
    assert not any(rival.compiles for rival in one_shape._rivals(torch.device("cpu"), None))
    assert [rival.name for rival in one_shape._rivals(torch.device("cpu"), ["compile"])] == ["compile"]


_WITHOUT_MORE = """
import sys
for name in ("numpy", "scipy", "tqdm", "matplotlib", "pytest", "sklearn", "bench", "examples", "tests"):
    sys.modules[name] = None  # an import of it raises ImportError
from fastbn.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_installed_fastbn_needs_torch_alone(tmp_path):
    """Only the package is on the path, as after the installation of a wheel, and the current directory is empty."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    site.mkdir(), empty.mkdir()
    (site / "fastbn").symlink_to(Path(fastbn.__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", _WITHOUT_MORE, *BRIEF, "--shape", "8,3", "--json"]
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [each["implementation"] for each in json.loads(done.stdout)["timings"]] == ["torch", "fastbn"]
    assert not list(empty.iterdir())
