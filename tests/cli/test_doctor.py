"""`fastbn doctor`: what it takes, prints and returns, and the example of docs/doctor.md."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbn
from fastbn.cli import main
from tests.inspect import planted
from tests.packages import needs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "doctor.md").read_text()

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = (
    "from torch import nn\nmake = lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Be in an empty directory, of which modules are imported again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    importlib.invalidate_caches()


def write(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return f"{name}:make"


def test_the_example_of_the_page(folder, capsys):
    code, output = re.search(
        r"^## An example$.*?^```python\n(.*?)^```.*?^```text\n(.*?)^```", PAGE, re.S | re.M
    ).groups()
    assert main(["doctor", write(folder, "net", code), "--input", "16,3,64,64"]) == 1
    assert capsys.readouterr().out == output


def test_the_python_of_the_page():
    exec(re.search(r"^```python\n(.*?)^```", PAGE, re.S | re.M)[1], {})


def test_a_sound_model(folder, capsys):
    target = write(folder, "sound", SOUND)
    assert main(["doctor", target]) == 0
    assert "Nothing found.\n" in capsys.readouterr().out
    assert main(["doctor", target, "--mode", "eval"]) == 1
    assert "never-updated" in capsys.readouterr().out
    assert main(["doctor", target, "--input", "1x3x9x9", "--device", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "small-batch" in printed and "on h200" in printed


@pytest.mark.parametrize("level, status", [("error", 0), ("warning", 1), ("note", 1)])
def test_severities_that_fail(folder, capsys, level, status):
    target = write(folder, f"warns_{level}", "from torch import nn\nmake = nn.BatchNorm2d(8, momentum=0.0)")
    assert main(["doctor", target, "--fail-on", level]) == status
    assert "1 warning." in capsys.readouterr().out


def test_a_note_fails_only_where_it_is_asked_for(folder, capsys):
    notes = "from torch import nn\nmake = lambda: nn.BatchNorm2d(8, track_running_stats=False)"
    target = write(folder, "notes", notes)
    assert [main(["doctor", target, *more]) for more in ([], ["--fail-on", "note"])] == [0, 1]


def test_json(folder, capsys):
    assert main(["doctor", write(folder, "sound_json", SOUND), "--input", "4,3,9,9", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["findings"] == [] and content["layers"] == 1
    assert content["conversion"]["traffic"][0]["operation"] == "BN + relu"


def test_a_checkpoint(folder, capsys):
    saved, expected = planted.checkpoint()
    torch.save(saved, folder / "saved.pt")
    assert main(["doctor", "saved.pt", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert {(found["code"], found["layer"]) for found in content["findings"]} == expected
    assert content["conversion"] is None


@needs("safetensors")
def test_a_file_of_safetensors(folder, capsys):
    from safetensors.torch import save_file

    save_file(nn.BatchNorm2d(8).state_dict(), folder / "saved.safetensors")
    assert main(["doctor", "saved.safetensors"]) == 1
    assert "never-updated" in capsys.readouterr().out


def test_a_file_whose_package_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["doctor", "saved.safetensors"]) == 2
    assert capsys.readouterr().err == "fastbn doctor needs safetensors for this file: pip install safetensors\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("make = 3", "TypeError: 'int' object is not callable"),
        ("def make(): return 3", "expected a torch.nn.Module from {}, got int"),
        ("def make(n): pass", "TypeError: make() missing 1 required positional argument: 'n'"),
        ("def make(): raise OSError('no weights\\nhere')", "got OSError: no weights"),
        ("import nothing_of_the_kind", "got ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("made = 3", "AttributeError: module "),
        ("make = (", "got SyntaxError: "),
    ],
    ids=["no callable", "no module", "arguments", "raises", "imports", "attribute", "syntax"],
)
def test_models_that_cannot_be_made(folder, capsys, text, said, request):
    name = "broken_" + request.node.callspec.id.replace(" ", "_")
    target = write(folder, name, text)
    assert main(["doctor", target]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(target) in line and target in line


@pytest.mark.parametrize(
    "text, said",
    [
        ("raise SystemExit(0)", "expected a model from {}, got SystemExit: 0"),
        ("def make(): raise SystemExit", "expected a model from {}, got SystemExit"),
        (
            "from torch import nn\nclass make(nn.Module):\n"
            "    def __init__(self): super().__init__(); self.bn = nn.BatchNorm2d(8)\n"
            "    def forward(self, x): raise SystemExit('\x1b[2J')",
            r"doctor: the model's forward raised SystemExit: \x1b[2J",
        ),
        (
            "from torch import nn\nclass make(nn.BatchNorm2d):\n    def __init__(self): super().__init__(8)\n"
            "    def named_buffers(self, *args, **options): raise SystemExit(0)",
            "expected a model that can be examined, got one whose code exits: {}",
        ),
    ],
    ids=["import", "call", "forward", "elsewhere"],
)
def test_models_that_exit(folder, capsys, text, said, request):
    target = write(folder, f"exits_{request.node.callspec.id}", text)
    assert main(["doctor", target, "--input", "4,8,4,4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == said.format(target)


def _module(folder):
    torch.save(nn.BatchNorm2d(8), folder / "file")


def _tensor(folder):
    torch.save(torch.ones(3), folder / "file")


def _no_layers(folder):
    torch.save(nn.Conv2d(3, 8, 1).state_dict(), folder / "file")


def _layers(folder):
    torch.save(nn.BatchNorm2d(8).state_dict(), folder / "file")


@pytest.mark.parametrize(
    "make, more, said",
    [
        (None, [], "got file: No such file or directory"),
        (lambda folder: (folder / "file").mkdir(), [], "got file: Is a directory"),
        (lambda folder: (folder / "file").write_text("text"), [], "what neither torch.load(weights_only=True) nor"),
        (lambda folder: (folder / "file").write_bytes(b""), [], "what neither torch.load(weights_only=True) nor"),
        (_module, [], "what neither torch.load(weights_only=True) nor"),
        (_tensor, [], "got a Tensor in file"),
        (_no_layers, [], "expected a state_dict with running_mean and running_var, got none"),
        (_layers, ["--input", "2,8"], "expected a model beside --input, --mode and --device, got a checkpoint: file"),
        (_layers, ["--mode", "eval"], "expected a model beside --input, --mode and --device, got a checkpoint: file"),
    ],
    ids=["missing", "folder", "text", "empty", "pickle", "tensor", "no layers", "input", "mode"],
)
def test_files_that_cannot_be_used(folder, capsys, make, more, said):
    if make is not None:
        make(folder)
    assert main(["doctor", "file", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.startswith(("expected ", "doctor: expected "))


def test_an_input_that_does_not_fit(folder, capsys):
    assert main(["doctor", write(folder, "sound_input", SOUND), "--input", "2,3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("doctor: the model's forward raised RuntimeError: ")


def test_the_command_is_the_function(folder, capsys):
    target = write(folder, "same", SOUND)
    main(["doctor", target])
    assert capsys.readouterr().out == f"{fastbn.doctor(importlib.import_module('same').make())}\n"
