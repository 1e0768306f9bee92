"""Records of a run as dataclasses, and the JSON file of them, whose schema is results.schema.json.

Times are in microseconds per call, statistics over the rounds of a measurement. `implementation` names a row of
fastbn/measure/implementations.py, `kernel` the kernels that ran: cudnn or native for torch, a plan's name for fastbn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastbn.measure.timer import Times

FORMAT = "fastbn bench 1"
SCHEMA = Path(__file__).with_name("results.schema.json")
# The largest file that is read: a hundred times the largest run.
MAX_BYTES = 2**28
# A fraction from 0 to 1.
Share = typing.NewType("Share", float)
# One of DTYPES, since files are named after it.
Dtype = typing.NewType("Dtype", str)
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Subject:
    """An op on a case by an implementation."""

    group: str
    case: str
    shape: tuple[int, ...]
    layout: str
    dtype: Dtype
    op: str
    implementation: str
    kernel: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON has lists

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.case, self.dtype, self.op, self.implementation


@dataclass(frozen=True)
class Measurement(Subject, Times):
    """Device time (on a CPU: time) of one op.

    tensor_bytes: S, the bytes of one activation tensor. floor_bytes: minimum of bytes that the op moves. gb_per_s:
    floor_bytes over the median, in 1e9 bytes per second. copy_share: its fraction of what a copy of S bytes reached in
    the same run. speedup_over: by name of another implementation of the same rounds, the median over the rounds of its
    time over this one's.
    """

    tensor_bytes: int
    floor_bytes: int
    gb_per_s: float
    copy_share: float
    speedup_over: dict[str, float]


@dataclass(frozen=True)
class Call(Subject, Times):
    """Costs of a call beside its device time. Times are the host's, from call to return, with an empty queue.

    launches: kernels per call, counted by the profiler, None on a CPU. held_bytes: what stays allocated between forward
    and backward beyond the input; peak_bytes: the maximum allocated at once beyond the inputs; None where not known.
    """

    launches: int | None
    kernels: list[str]
    held_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class NetworkStep(Times):
    """A pass of a network over a batch: `train_backward` is forward, loss and backward, `eval` forward without
    gradients, and `step` of older files train_backward with an update by SGD.

    shape: of the input. dtype: bfloat16 is autocast. norm_share: fraction of the time, by the profiler, in BatchNorm,
    activation and residual addition. first_loss: that of the first pass, equal up to rounding for every
    implementation. peak_bytes: allocated at once beyond parameters and the batch, on a GPU.
    """

    network: str
    source: str
    group: str
    shape: tuple[int, ...]
    dtype: Dtype
    layout: str
    op: str
    implementation: str
    norm_share: Share | None
    first_loss: float
    peak_bytes: int | None
    speedup_over: dict[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON has lists

    @property
    def case(self) -> str:
        return case_name(self.network, self.shape, self.layout)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.case, self.dtype, self.op, self.implementation


def case_name(kind: str, shape: Sequence[int], layout: str) -> str:
    """Return a name such as resnet50-4x3x64x64-channels_last; contiguous is not named."""
    return "-".join([kind, "x".join(map(str, shape)), *[layout] * (layout != "contiguous")])


@dataclass(frozen=True)
class CopyPoint:
    """A copy of a tensor of `bytes` bytes; it moves twice as many."""

    bytes: int
    median_us: float
    gb_per_s: float


@dataclass(frozen=True)
class Refusal:
    """An implementation that was not timed: it cannot take the case, or its result was wrong.

    count: number of workloads that it cannot take for the same reason; case, dtype and op are those of the first.
    """

    case: str
    dtype: Dtype
    op: str
    implementation: str
    wrong: bool
    reason: str
    count: int = 1


@dataclass
class Results:
    """A run. `machine` and `settings` are flat dicts; `complete` is False if it was interrupted or ran out of time."""

    machine: dict
    settings: dict
    complete: bool = False
    copy: list[CopyPoint] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    networks: list[NetworkStep] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def copy_gb_per_s(self, tensor_bytes: int) -> float:
        """Return the bandwidth of a copy of a tensor of that size, interpolated between the sizes that were copied."""
        points = sorted(self.copy, key=lambda point: point.bytes)
        if tensor_bytes <= points[0].bytes:
            return points[0].gb_per_s
        for low, high in zip(points, points[1:]):
            if tensor_bytes <= high.bytes:
                part = (tensor_bytes - low.bytes) / (high.bytes - low.bytes)
                # The time of a copy grows linearly between two sizes: a launch and its bytes.
                microseconds = low.median_us + part * (high.median_us - low.median_us)
                return 2 * tensor_bytes / microseconds / 1e3
        return points[-1].gb_per_s

    def save(self, path: Path) -> None:
        """Write the whole file or nothing: a reader, or an interrupt, never sees half of it."""
        partial = partial_path(path)
        try:
            partial.write_text(_dump({"format": FORMAT, **dataclasses.asdict(self)}))
            os.replace(partial, os.path.realpath(path))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_path(path: Path) -> Path:
    """Return the path of the file that `Results.save` renames to `path`, beside the file that a link points to."""
    path = Path(os.path.realpath(path))
    return path.parent / f"{path.name}.partial"


_RECORDS = {
    "copy": CopyPoint,
    "measurements": Measurement,
    "calls": Call,
    "networks": NetworkStep,
    "refusals": Refusal,
}
# Limits of numbers that a file may hold. No measurement exceeds them, and no table or plot overflows by them.
_MIN, _MAX = 1e-18, 1e18
# The fields that tables and plots rely on.
_MACHINE = {"device": str | None, "gpu": dict | None, "datasheet_gb_per_s": float | None, "modified": bool | None}
_GPU = {"capability": str, "memory_bytes": int, "l2_bytes": int, "sm_count": int}


def _dump(content: dict) -> str:
    """Write JSON with one record per line, which version control can compare, and five digits per number: the rest is
    noise.
    """
    lines = []
    for key, value in content.items():
        if key in _RECORDS and value:
            records = ",\n".join(f"  {json.dumps(_rounded(record))}" for record in value)
            lines.append(f'"{key}": [\n{records}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value, indent=1)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def load(path: Path) -> Results:
    """Read a file that `Results.save` wrote. Raises OSError, or ValueError where it is not one."""
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes of JSON, got more")
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # raises on half of a surrogate pair, which none can print
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    got = content.pop("format", None) if isinstance(content, dict) else None
    if got != FORMAT:
        raise ValueError(f"{path}: expected the format {FORMAT!r}, got {reprlib.repr(got)}")
    try:
        for key, record in _RECORDS.items():
            _check(key, content[key], list)
            content[key] = [_checked(record(**item)) for item in content[key]]
        results = _checked(Results(**content))
        for key, hint in _MACHINE.items():
            _check(f"machine: {key}", results.machine.get(key), hint)
        gpu = results.machine.get("gpu")
        for key, hint in _GPU.items() if gpu is not None else ():
            _check(f"machine: gpu: {key}", gpu.get(key), hint)
        return results
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the fields of {FORMAT!r}: {error}") from None


def _checked(record):
    for name, hint in typing.get_type_hints(type(record)).items():
        _check(name, getattr(record, name), hint)
    return record


def _check(name: str, value: object, hint: object) -> None:
    if not _is(value, hint):
        raise ValueError(f"{name} is {reprlib.repr(value)}")


def _is(value: object, hint: object) -> bool:
    """Return whether a field of type `hint` may hold `value`. Numbers are finite; only integers may be 0."""
    kind, of = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):  # the latter is what | makes of a NewType
        return any(_is(value, each) for each in of)
    if kind is dict:
        return isinstance(value, dict) and all(_is(each, of[1]) for each in value.values())
    if kind is list:
        return isinstance(value, list) and all(_is(each, of[0]) for each in value)
    if kind is tuple:  # a shape
        return isinstance(value, tuple) and len(value) >= 2 and all(_is(each, of[0]) for each in value)
    if hint in (int, float, Share):
        if not isinstance(value, int if hint is int else (int, float)) or isinstance(value, bool):
            return False
        return (_MIN if hint is float else 0) <= value <= (1 if hint is Share else _MAX)
    return value in DTYPES if hint is Dtype else isinstance(value, hint)
