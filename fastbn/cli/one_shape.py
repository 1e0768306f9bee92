"""`fastbn bench --shape N,C,...`: one op on one shape, in seconds, wherever fastbn is installed."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from fastbn.cli.arguments import check_file
from fastbn.cli.errors import CommandError, RunError, device, reason
from fastbn.cli.text import table
from fastbn.measure import operations
from fastbn.measure.implementations import Implementation, implementations
from fastbn.measure.one_shape import OneShape, Timing, measure_shape
from fastbn.measure.operations import Operation
from fastbn.measure.workload import Workload, dtype_name
from fastbn.testing.cases import make_case

SECONDS = 1.0
STDOUT = Path("-")
# The dtypes by their spellings, without "torch.".
DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), torch.float16),
    **dict.fromkeys(("float32", "fp32", "f32", "float"), torch.float32),
}
# What a suite has and one shape has not.
_OF_SUITES = ("case", "part", "time_limit", "against_itself", "plots", "load", "compare")


def run(args: argparse.Namespace) -> int:
    """Time one shape, and print what came out. Returns 1 if fastbn's result is wrong or it cannot run here, else 0."""
    for option in _OF_SUITES:
        given = getattr(args, option)
        if given is not None and given is not False:
            name = option.replace("_", "-")
            raise CommandError(f"--{name}: expected --suite beside it, got --shape alone, which times one shape")
    workload = _workload(args)
    if args.list:
        print(workload)
        return 0
    to_stdout = args.json == STDOUT
    if args.json and not to_stdout:
        check_file("--json", args.json)
    where = device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rivals = _rivals(where, args.implementation)
    try:
        result = measure_shape(workload, where, rivals, SECONDS if args.seconds is None else args.seconds)
    except RuntimeError as error:  # above all torch's, that there is no memory for it
        raise RunError(f"--shape: cannot measure {workload}: {(str(error).splitlines() or [''])[0]}") from None
    text = json.dumps(result.as_json(), indent=2)
    print(text if to_stdout else "\n".join(lines(result)))
    if args.json and not to_stdout:
        _write(args.json, text)
    return int(result.fastbn_failed)


def dtype_patterns(patterns: list[str]) -> list[str]:
    """Return patterns of dtypes with other spellings of a dtype (bf16, half, torch.float32) replaced by its name."""
    found = (DTYPES.get(pattern.removeprefix("torch.")) for pattern in patterns)
    return [pattern if dtype is None else dtype_name(dtype) for pattern, dtype in zip(patterns, found, strict=True)]


def shape_patterns(patterns: list[str]) -> list[str]:
    """Return patterns of shapes; numbers alone, 16,64,56,56, are the one shape 16x64x56x56."""
    return ["x".join(patterns)] if len(patterns) > 1 and all(map(str.isdecimal, patterns)) else patterns


def lines(result: OneShape) -> Iterator[str]:
    """Yield the lines that show a result."""
    workload, machine = result.workload, result.machine
    shape = "x".join(map(str, workload.case.shape))
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else f", CUDA {machine['cuda']}"
    yield f"{workload.operation} of {shape} {dtype_name(workload.dtype)} {workload.case.layout}"
    yield f"{machine['name']}{threads}; torch {machine['torch']}; fastbn {machine['fastbn']}"
    yield ""
    if result.timings:
        head = ["", "us", "p20", "p80", "GB/s", "of a copy", "torch's time over it", "p20", "p80", "kernel"]
        yield from table([head, *map(_row, result.timings)], left=(0, 9))
        yield ""
    for refused in result.refused:
        yield f"{'WRONG' if refused.wrong else 'Left out'}: {refused.implementation}: {refused.reason}"
    for direction, plan in result.plans.items():
        yield f"fastbn's {direction}: {plan}"
    sizes = _megabytes(result.floor_bytes), _megabytes(workload.tensor_bytes)
    names = ", ".join(timing.implementation for timing in result.timings) or "none"
    yield f"Agreed with float64 before it was timed: {names}. Rounds: {_rounds(result)}."
    copy = f"{result.copy_gb_per_s:.1f} GB/s"
    yield "GB/s counts each tensor once, {}; a copy of {} reached {}.".format(*sizes, copy)


def _row(timing: Timing) -> list[str]:
    times, ratios = timing.times, (timing.speedup, timing.speedup_p20, timing.speedup_p80)
    return [
        timing.implementation,
        *(f"{value:.1f}" for value in (times.median_us, times.p20_us, times.p80_us)),
        f"{timing.gb_per_s:.1f}",
        f"{timing.copy_share:.2f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        timing.kernel,
    ]


def _rounds(result: OneShape) -> str:
    return str(max((timing.times.rounds for timing in result.timings), default=0))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"


def _workload(args: argparse.Namespace) -> Workload:
    shape = _shape(args.shape)
    layout = _layout(args.layout, len(shape))
    return Workload("one shape", make_case("shape", *shape, layout=layout), _dtype(args.dtype), _operation(args.op))


def _shape(given: list[str]) -> tuple[int, ...]:
    (text, *others) = shape_patterns(given)
    fits = not others and re.fullmatch(r"\d{1,18}(x\d{1,18}){1,4}", text)
    shape = tuple(map(int, text.split("x"))) if fits else ()
    if not shape or 0 in shape or math.prod(shape) // shape[1] < 2 or math.prod(shape) >= 2**62:
        raise CommandError(
            "--shape: expected one shape of 2 to 5 sizes and more than one value per channel, such as 16,64,56,56, "
            f"or --suite beside patterns, got {','.join(given)}"
        )
    return shape


def _one(option: str, given: list[str] | None, default: str) -> str:
    if given is None:
        return default
    if len(given) > 1:
        raise CommandError(f"--{option}: expected one beside --shape without --suite, got {','.join(given)}")
    return given[0]


def _layout(given: list[str] | None, dims: int) -> str:
    layout = _one("layout", given, "contiguous")
    known = {4: ("contiguous", "channels_last"), 5: ("contiguous", "channels_last", "channels_last_3d")}
    expected = known.get(dims, ("contiguous",))
    if layout not in expected:
        raise CommandError(f"--layout: expected {' or '.join(expected)} for a shape of {dims} sizes, got {layout}")
    return "channels_last_3d" if dims == 5 and layout == "channels_last" else layout


def _dtype(given: list[str] | None) -> torch.dtype:
    name = _one("dtype", given, "float32")
    dtype = DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise CommandError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name}")
    return dtype


def _operation(given: list[str] | None) -> Operation:
    try:
        return operations.parse(_one("op", given, "train_backward"))
    except ValueError as error:
        raise CommandError(f"--op: {error}") from None


def _rivals(where: torch.device, patterns: list[str] | None) -> list[Implementation]:
    """Return the implementations that are asked for; those that take long to compile only by name."""
    known = implementations(where)
    rivals = [
        rival
        for rival in known
        if (not rival.compiles if patterns is None else any(fnmatch.fnmatchcase(rival.name, p) for p in patterns))
    ]
    if not rivals:
        expected = ", ".join(rival.name for rival in known)
        raise CommandError(f"--implementation: expected some of {expected}, got {','.join(patterns or [])}")
    return rivals


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--json: cannot write {path}: {reason(error)}") from None
