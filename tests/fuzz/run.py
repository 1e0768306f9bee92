"""Runs many cases: hypothesis draws them, faults are collected by kind, and one case of each kind is shrunk."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from tests import implementations
from tests.emulator import build
from tests.fuzz.case import Case
from tests.fuzz.check import Fault, Report, examine
from tests.fuzz.strategies import cases

# hypothesis repeats a batch to find a case again and shrink it; a short batch repeats quickly.
BATCH = 500
# A launch that is emulated or interpreted costs milliseconds per block.
SLOW_NUMEL = 300
MAX_NUMEL = 65536
SHRINKING_SECONDS = 10


@dataclass
class Found:
    """The faults of a kind: the number of cases, and the smallest one."""

    fault: Fault
    case: Case
    count: int = 1


@dataclass
class Summary:
    """The outcome of the cases of a run."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    counts: dict[str, Counter] = field(default_factory=dict)
    found: dict[str, Found] = field(default_factory=dict)

    def add(self, case: Case, report: Report) -> None:
        properties = {
            "outcome": report.outcome,
            "mode": "training" if case.training else "evaluation",
            "dtype": case.dtype,
            "dimensions": len(case.shape),
            "layout": case.layout.name,
            "gradient's layout": case.grad_layout.name,
            "activation": case.activation,
            "activation_param": case.activation_param,
            "data": case.data[0],
            "residual": case.residual,
            "hook": case.hook,
            "interface": case.api,
            "backend": case.backend,
            "backward": case.backward if case.requires else "none",
            "oddity": case.oddity,
        }
        for name, value in properties.items():
            self.counts.setdefault(name, Counter())[str(value)] += 1

    def merge(self, other: Summary) -> None:
        self.cpu_seconds += other.cpu_seconds
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counter()).update(counts)
        for kind, found in other.found.items():
            mine = self.found.get(kind)
            if mine is None or _size(found.case) < _size(mine.case):
                self.found[kind] = Found(found.fault, found.case, found.count + (mine.count if mine else 0))
            else:
                mine.count += found.count

    def text(self) -> str:
        lines = [f"{name}: " + ", ".join(f"{v} {n}" for v, n in c.most_common()) for name, c in self.counts.items()]
        for kind, found in sorted(self.found.items()):
            lines += ["", f"FAULT ({found.count} cases) {kind}", f"  {found.fault.message}", found.case.code()]
        total = sum(self.counts.get("outcome", Counter()).values())
        took = f"{self.seconds:.0f} s ({self.cpu_seconds:.0f} s of CPU)"
        return "\n".join([*lines, "", f"{total} cases in {took}, {len(self.found)} kinds of fault"])


class _OutOfTime(BaseException):
    """The end of the time. It is not an Exception, so that hypothesis lets it through."""


def _size(case: Case) -> tuple[int, int]:
    return len(repr(case)), sum(case.shape)


def _drive(strategy, test: Callable[[Case], None], seed: int, count: int, phases: tuple[Phase, ...]) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(strategy)
    def driven(case):
        test(case)

    driven()


@contextlib.contextmanager
def _unwritten_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run(
    count: int,
    seed: int,
    implementation: str = "cpu",
    max_numel: int = MAX_NUMEL,
    shrunk_kinds: int = 24,
    before_case: Callable[[Case], Any] = lambda case: None,
    share: tuple[int, int] = (0, 1),
) -> Summary:
    """Examine that many cases, and shrink one of each of the first kinds of fault. Equal arguments draw equal cases.

    `share` (i, n) examines the i-th of n shares of them: the cases of a seed are the same for every n.
    """
    emulated = implementation in implementations.EMULATED_LIMITS
    implementations.load(implementation)
    if emulated:
        build.load().set_limits(**implementations.EMULATED_LIMITS[implementation])
    if implementation in implementations.TRITON_LIMITS:
        implementations.set_triton_limits(implementation)
    if implementations.is_slow(implementation):
        max_numel = min(max_numel, SLOW_NUMEL)
    strategy = cases(implementation, max_numel)
    summary = Summary()
    begin, cpu_begin = time.perf_counter(), time.process_time()

    def examined(case: Case) -> Report:
        before_case(case)
        if emulated:
            build.load().set_seed(case.seed)
        try:
            return examine(case)
        except Exception as error:
            return Report("none", [Fault(f"the fuzzer itself: {type(error).__name__}", traceback.format_exc())])

    with _unwritten_memory_is_nan():
        for batch, start in list(enumerate(range(0, count, BATCH)))[share[0] :: share[1]]:
            new: dict[str, Found] = {}

            def explore(case: Case) -> None:
                report = examined(case)
                summary.add(case, report)
                for fault in report.faults:
                    known = summary.found.get(fault.kind) or new.get(fault.kind)
                    if known is None:
                        new[fault.kind] = Found(fault, case)
                    else:
                        known.count += 1

            batch_seed, batch_count = seed * 1_000_003 + batch, min(BATCH, count - start)
            _drive(strategy, explore, batch_seed, batch_count, (Phase.generate,))
            for kind, found in new.items():
                if len(summary.found) < shrunk_kinds:
                    _shrink(found, functools.partial(_drive, strategy, seed=batch_seed, count=batch_count), examined)
                summary.found[kind] = found
    summary.seconds, summary.cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return summary


def _shrink(found: Found, drive: Callable, examined: Callable[[Case], Report]) -> None:
    """Let hypothesis draw the batch again up to the case, and shrink it."""
    kind, deadline = found.fault.kind, None

    def shrinking(case: Case) -> None:
        nonlocal deadline
        if deadline is not None and time.perf_counter() > deadline:
            raise _OutOfTime
        for fault in examined(case).faults:
            if fault.kind == kind:
                deadline = deadline or time.perf_counter() + SHRINKING_SECONDS
                if _size(case) < _size(found.case):
                    found.fault, found.case = fault, case
                raise AssertionError(kind)

    with contextlib.suppress(AssertionError, _OutOfTime):
        drive(test=shrinking, phases=(Phase.generate, Phase.shrink))


def run_alone(count: int, seed: int, implementation: str, file: Path, share: tuple[int, int]) -> Summary:
    """Call `run` in a process of its own; `file` has the code of the current case in case the process dies."""
    faulthandler.enable()
    torch.set_num_threads(1)
    return run(count, seed, implementation, before_case=lambda case: file.write_text(case.code()), share=share)
