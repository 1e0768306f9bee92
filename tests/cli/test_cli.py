"""The command line: what each command prints, writes and returns, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbn
from fastbn.cli import clone, main
from fastbn.cli.text import outline
from fastbn.testing import compare

ROOT = Path(__file__).resolve().parents[2]


def test_verify(capsys):
    assert main(["verify", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "are within their bound." in printed and "FAIL" not in printed
    assert "10000 ± 0.01" in printed


@pytest.mark.slow
def test_verify_finds_an_error(capsys, monkeypatch):
    exact = compare.batch_norm
    monkeypatch.setattr(compare, "batch_norm", lambda *args, **kwargs: exact(*args, **kwargs) * (1 + 2**-8))
    assert main(["verify", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  output: " in printed and "exceed their bound." in printed


@pytest.mark.gpu
def test_verify_on_a_gpu(capsys):
    assert main(["verify", "--device", "cuda"]) == 0, capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_outline_takes_any_content():
    content = {"version": "1", "built": {"cuda": False, "for": [], "deep": {"with": ["a", "b"]}}, "gone": None}
    assert outline(content) == [
        "version   1",
        "built",
        "  cuda    no",
        "  for     none",
        "  deep",
        "    with  a, b",
        "gone      -",
    ]
    assert outline({}) == []


@pytest.mark.parametrize("command", ["verify", "demo"])
def test_no_gpu(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--device", "cuda"]) == 2
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["info", "verify", "demo"]),
        (["info"], ["backends"]),
        (["verify"], ["--device", "--quick", "ulp"]),
        (["doctor"], ["MODEL", "--input", "--mode", "--fail-on", "--json", "module:callable", "Exits with"]),
        (["demo"], ["--data", "--epochs", "--batch-size", "--lr", "--seed", "--out", "Time in BatchNorm"]),
    ],
)
def test_help(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["demo", "--epochs", "0"],
        ["demo", "--lr", "-1"],
        ["demo", "--lr", "nan"],
        ["verify", "--device", "tpu"],
    ],
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: fastbn" in capsys.readouterr().err


def test_the_bare_command_shows_its_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert "usage: fastbn" in printed.out and "verify" in printed.out and not printed.err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fastbn.info()


@pytest.mark.parametrize("command, folder", [("bench", "bench"), ("demo", "examples")])
def test_outside_a_clone_a_command_says_what_it_needs(command, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastbn, "__file__", str(tmp_path / "fastbn" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    said = f"fastbn {command} runs in a clone of fastbn: expected the folder {folder} in {tmp_path}\n"
    assert capsys.readouterr().err == said


def test_an_installed_command_finds_the_clone_in_the_current_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(fastbn, "__file__", str(tmp_path / "fastbn" / "__init__.py"))
    monkeypatch.chdir(ROOT)
    assert Path(clone.load("demo", "examples.lenet.command").__file__) == ROOT / "examples" / "lenet" / "command.py"


@pytest.mark.parametrize(
    "module, usage",
    [
        pytest.param("bench", "fastbn bench", marks=pytest.mark.slow),
        ("examples.lenet", "fastbn demo"),
    ],
)
def test_a_command_and_its_module_are_one(module, usage):
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"usage: {usage}" in shown.stdout
