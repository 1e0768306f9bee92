"""Examine the BatchNorms of a model or a checkpoint: statistics that are zero, negative, NaN or exploded, layers that
were never updated, shared or in the wrong mode, biases and activations before them, batches that are too small. Say
what fastbn.convert would fuse, and which memory traffic that saves."""

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbn.cli.errors import CommandError, reason
from fastbn.inspect.doctor import SEVERITIES, doctor

SUMMARY = "find what is wrong with the BatchNorms of a model or a checkpoint"

_NOTE = """\
A module:callable is imported from the current directory or from what is installed, and called without arguments; it
may also be the model itself. Files are those of torch.save, read with weights_only=True, or of safetensors; a
state_dict may lie at any key, as in {"state_dict": ...}.

Findings are errors (results are wrong, or a call raises), warnings (hardly what was meant) and notes (costs and risks).
Exits with 0 if there are none of the --fail-on severity or worse, with 1 if there are, and with 2 for arguments, files
or models that the command cannot use. docs/doctor.md explains every finding.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastbn doctor`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTE
    parser.add_argument("target", metavar="MODEL", help="module:callable, as torchvision.models:resnet50, or a file")
    parser.add_argument(
        "--input",
        type=_shape,
        metavar="SHAPE",
        help="shape of a batch, as 32,3,224,224 or 32x3x224x224: a forward pass shows the batches of every layer",
    )
    parser.add_argument(
        "--mode", choices=["train", "eval"], help="examine the model after .train() or .eval() (default: as it is)"
    )
    parser.add_argument(
        "--device",
        choices=["a100", "h100", "h200", "b200"],
        help="predict the traffic on this GPU, which need not be here (default: where the model is)",
    )
    parser.add_argument(
        "--fail-on", choices=SEVERITIES, default="warning", help="the least severity that fails (default: warning)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 if there are findings of the severity that fails, else 0."""
    model = _load(args.target)
    if not isinstance(model, nn.Module) and (args.input or args.mode or args.device):
        raise CommandError(f"expected a model beside --input, --mode and --device, got a checkpoint: {args.target}")
    training = None if args.mode is None else args.mode == "train"
    try:
        diagnosis = doctor(model, args.input, training=training, device=args.device)
    except ValueError as error:
        raise CommandError(_first_line(error)) from None
    print(json.dumps(diagnosis.as_dict(), indent=2) if args.json else diagnosis)
    return 1 if diagnosis.at_least(args.fail_on) else 0


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _shape(text: str) -> tuple[int, ...]:
    """Parse sizes of at least 1, separated by commas or x. An argparse type."""
    if not re.fullmatch(r"[1-9]\d{0,9}([,x][1-9]\d{0,9})*", text):
        raise argparse.ArgumentTypeError(f"expected a shape such as 32,3,224,224, got {text[:40]!r}")
    return tuple(map(int, re.split("[,x]", text)))


def _load(target: str) -> Any:
    """Return the module or the checkpoint that `target` names. Raises CommandError where there is none."""
    if re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", target) and not Path(target).exists():
        return _make(target)
    return _read(target)


def _make(target: str) -> nn.Module:
    name, _, path = target.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made: Any = importlib.import_module(name)
        for part in path.split("."):
            made = getattr(made, part)
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # whatever the user's code raises
        got = f"{type(error).__name__}: {_first_line(error)}"
        raise CommandError(f"expected a model from {target}, got {got}") from None
    if not isinstance(model, nn.Module):
        raise CommandError(f"expected a torch.nn.Module from {target}, got {type(model).__name__}")
    return model


def _read(file: str) -> Any:
    expected = "expected module:callable or a file with a state_dict"
    read = _safetensors().load_file if file.endswith(".safetensors") else _read_torch
    try:
        content = read(file)
    except OSError as error:
        raise CommandError(f"{expected}, got {file}: {reason(error)}") from None
    except Exception as error:  # of pickle, of zip archives, of torch
        got = f"what neither torch.load(weights_only=True) nor safetensors reads ({type(error).__name__})"
        raise CommandError(f"{expected}, got {file}, {got}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{expected}, got a {type(content).__name__} in {file}")
    return content


def _read_torch(file: str) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise CommandError("fastbn doctor needs safetensors for this file: pip install safetensors") from None
