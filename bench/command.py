"""The work of `python -m bench`: choose the steps, measure them or load records, then show, write and compare."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import compare, network_tables, tables
from bench.machine import describe, machine
from bench.network_cases import NetworkCase, why_absent
from bench.network_cases import suite as network_suite
from bench.network_models import NAMES, TORCH, is_ours, names_of
from bench.results import Measurement, NetworkStep, Refusal, Results, load, partial_path
from bench.runner import Runner, Step
from bench.workloads import SUITES, call_suite, suite
from fastbn.cli.arguments import check_directory, check_file
from fastbn.cli.errors import CommandError, RunError, device, reason, require
from fastbn.measure.implementations import AGAIN, FASTBN, Implementation, implementations
from fastbn.measure.timer import Budget
from fastbn.measure.workload import Workload, dtype_name

# Seconds per implementation. The CPU suite has to end within a quarter of an hour, and that of networks on one thread,
# at the price of noisier ratios.
SECONDS = {"quick": 0.15, "cpu": 0.08, "gpu": 0.15, "visit": 0.15, "networks": 0.05}
SAVE_EVERY_SECONDS = 10.0
# A regression is reported after it was seen again this many times.
CONFIRMATIONS = 2
# Above this number of cases the terminal shows the worst ones.
SHOWN_CASES = 70
PARTS = ("layers", "calls", "networks")
REPORT = "report.md"


def run(args) -> int:
    """Run the command. Returns 0, 1 for a wrong result of fastbn or a regression, or 130 for an interrupt."""
    old = _load("--compare", args.compare) if args.compare else None
    interrupted = False
    if args.load:
        results = _load("--load", args.load)
        _check_outputs(args)
    else:
        runner, steps = _plan(args)
        results = runner.results
        if args.list:
            print("\n".join(step.name for step in steps))
            return 0
        _check_outputs(args)
        print(describe(results.machine), flush=True)
        interrupted = _measure(steps, results, args.json, args.time_limit)
        if old is not None and not interrupted:
            _measure_again(runner, steps, old)
    if args.json:
        _save(results, args.json)
    print("\n".join(_report(results)))
    if args.plots:
        _plot(results, args.plots)
    # fastbn takes every case, so a refusal means a wrong result, an error, or that it cannot run here.
    wrong = any(_is_ours(refusal.implementation) for refusal in results.refusals)
    regressed = False
    if old is not None:
        comparison = compare.compare(old, results)
        print("\n".join(["", *compare.lines(comparison)]))
        regressed = bool(comparison.regressions)
    return 130 if interrupted else int(wrong or regressed)


def _is_ours(implementation: str) -> bool:
    is_network = implementation.removesuffix(AGAIN) in NAMES
    return is_ours(implementation) if is_network else implementation.startswith(FASTBN)


def _check_outputs(args) -> None:
    """Check that all outputs can be written before anything is measured."""
    if args.json:
        check_file("--json", args.json, partial_path(args.json))
    if args.plots:
        require("bench", "matplotlib")
        plots = Path(os.path.realpath(args.plots))
        if args.json and Path(os.path.realpath(args.json)) in (plots, *plots.parents):
            raise CommandError(f"--plots: expected a directory that is not below --json's file, got {args.plots}")
        check_directory("--plots", args.plots, REPORT)


def _plan(args) -> tuple[Runner, list[Step]]:
    """Return a runner with empty results, and the steps that fill them."""
    of_suite = {"cpu": "cpu", "gpu": "cuda", "visit": "cuda"}.get(args.suite)
    if of_suite and args.device not in (of_suite, None):
        raise CommandError(f"--device: expected {of_suite} or none for the {args.suite} suite, got {args.device}")
    where = device(of_suite or args.device or _fastest_device())
    cases = network_suite(args.suite, where)
    _check_patterns(args, cases)
    rivals = _rivals(args, where)
    filters = {name: getattr(args, name) for name in ("case", "op", "shape", "dtype", "layout", "implementation")}
    parts = args.part or (["networks"] if args.suite == "networks" else list(PARTS))
    seconds = SECONDS[args.suite] if args.seconds is None else args.seconds
    settings = {
        "suite": args.suite,
        "parts": parts,
        "filters": {name: patterns for name, patterns in filters.items() if patterns != ["*"]},
        "seconds": seconds,
        "against_itself": args.against_itself,
    }
    results = Results(machine(where), settings)
    runner = Runner(where, rivals, Budget(seconds), results)
    steps = []
    if "calls" in parts and rivals:
        steps += [runner.call(workload) for workload in _selected(call_suite(), args)]
    if "networks" in parts and _asked(NAMES, args):
        chosen, results.refusals = _networks(cases, args)
        for refusal in results.refusals:
            print(f"Left out: {refusal.reason}", file=sys.stderr, flush=True)
        for case in chosen:
            # If a compiled model is asked for by name, it takes part in every case.
            names = _asked(names_of(case, where) if args.implementation == ["*"] else NAMES, args)
            names += [name + AGAIN for name in names if args.against_itself]
            steps.append(runner.network(case, names))
    # Layers come last: they are many, and --time-limit may cut them off.
    if "layers" in parts and rivals:
        layers = [runner.layer(workload) for workload in _selected(_layers(args), args)]
        steps += [runner.copies(), *layers] if layers else []
    if not steps:
        raise CommandError("expected patterns that some case fits, got none that fits all of them: see --list")
    return runner, steps


def _layers(args) -> list[Workload]:
    return suite(args.suite) if args.suite in SUITES else []


def _networks(cases: Sequence[NetworkCase], args) -> tuple[list[NetworkCase], list[Refusal]]:
    """Return the cases that are asked for and can be built here, and a refusal of each network that cannot."""
    chosen, absent = [], {}
    for case in cases:
        if not _takes(case, args):
            continue
        reason = why_absent(case.network)
        if reason is None:
            chosen.append(case)
        else:
            absent.setdefault(case.network, []).append((case, reason))
    refusals = []
    for (first, reason), *others in absent.values():
        about = first.name, dtype_name(first.dtype), first.op
        refusals.append(Refusal(*about, TORCH, False, reason, 1 + len(others)))
    return chosen, refusals


def _fastest_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rivals(args, where: torch.device) -> list[Implementation]:
    """Return the implementations of layers that are asked for."""
    known = implementations(where)
    rivals = [rival for rival in known if _fits(rival.name, args.implementation)]
    if not rivals and not _asked(NAMES, args):
        expected = ", ".join(dict.fromkeys([*(rival.name for rival in known), *NAMES]))
        raise CommandError(f"--implementation: expected some of {expected}, got {','.join(args.implementation)}")
    if args.against_itself:
        rivals += [dataclasses.replace(rival, name=rival.name + AGAIN) for rival in rivals]
    return rivals


def _asked(names: Sequence[str], args) -> list[str]:
    return [name for name in names if _fits(name, args.implementation)]


def _check_patterns(args, cases: Sequence[NetworkCase]) -> None:
    """Refuse the patterns of an option if nothing in the suite matches them, whatever the other options select."""
    workloads = [*_layers(args), *call_suite()]
    known = {
        "case": {name for workload in workloads for name in (workload.case.name, workload.group)}
        | {name for case in cases for name in _case_names(case)},
        "op": {str(workload.operation) for workload in workloads} | {case.op for case in cases},
        "shape": {_shape_name(workload.case.shape) for workload in workloads}
        | {_shape_name(case.shape) for case in cases},
        "dtype": {dtype_name(each.dtype) for each in (*workloads, *cases)},
        "layout": {workload.case.layout for workload in workloads} | {case.layout for case in cases},
    }
    for option, names in known.items():
        patterns = getattr(args, option)
        if not any(_fits(name, patterns) for name in names):
            got = ",".join(patterns)
            raise CommandError(f"--{option}: expected patterns that some case fits, got {got}: see fastbn bench --list")


def _shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _case_names(case: NetworkCase) -> tuple[str, ...]:
    return case.name, case.network, case.group


def _selected(workloads: Sequence[Workload], args) -> list[Workload]:
    # If torch.compile is asked for by name, it takes part in every case.
    compiled = args.implementation != ["*"]
    return [
        dataclasses.replace(workload, compiled=workload.compiled or compiled)
        for workload in workloads
        if (_fits(workload.case.name, args.case) or _fits(workload.group, args.case))
        and _fits(str(workload.operation), args.op)
        and _fits(_shape_name(workload.case.shape), args.shape)
        and _fits(dtype_name(workload.dtype), args.dtype)
        and _fits(workload.case.layout, args.layout)
    ]


def _takes(case: NetworkCase, args) -> bool:
    return (
        any(_fits(name, args.case) for name in _case_names(case))
        and _fits(case.op, args.op)
        and _fits(_shape_name(case.shape), args.shape)
        and _fits(dtype_name(case.dtype), args.dtype)
        and _fits(case.layout, args.layout)
    )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _measure(steps: Sequence[Step], results: Results, path: Path | None, time_limit: float | None) -> bool:
    """Run the steps under a progress bar and save now and then. Returns whether it was interrupted."""
    progress = require("bench", "tqdm").tqdm
    begun = saved = time.monotonic()
    # SIGTERM, which `kill` and `timeout` send, ends a run as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    shape = "{percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left, {desc}"
    try:
        with progress(total=sum(step.seconds for step in steps), bar_format=shape, smoothing=0, leave=False) as bar:
            for step in steps:
                if time_limit is not None and time.monotonic() - begun > time_limit:
                    return False
                bar.set_description_str(step.name)
                step.run()
                bar.update(step.seconds)
                if path and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    _save(results, path)
                    saved = time.monotonic()
        results.complete = True
        return False
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGTERM, previous)
        if path:
            _save(results, path)  # even if a step failed


def _measure_again(runner: Runner, steps: Sequence[Step], old: Results) -> None:
    """Measure suspected regressions again: what a neighbour on the machine caused is gone by then."""
    by_name = {step.name: step for step in steps}
    results = runner.results
    for _ in range(CONFIRMATIONS):
        suspects = {_name(change.record) for change in compare.compare(old, results).regressions}
        if not suspects:
            return
        print(f"Measuring {len(suspects)} cases again that seem to be slower.", flush=True)
        for name in suspects & by_name.keys():
            results.measurements = [each for each in results.measurements if _name(each) != name]
            results.networks = [each for each in results.networks if _name(each) != name]
            by_name[name].run()


def _name(record: Measurement | NetworkStep) -> str:
    """Return the name of the step that measures a record."""
    return " ".join(record.key[:3])


def _report(results: Results) -> list[str]:
    lines = [] if results.complete else ["", "Not complete: interrupted, or out of time."]
    few = len(results.measurements) <= 3 * SHOWN_CASES
    shown = (
        tables.cases(results, None if few else SHOWN_CASES // 3),
        tables.calls(results),
        network_tables.cases(results),
        tables.wrong(results),
        tables.unsupported(results),
        tables.summary(results),
        network_tables.by_network(results),
        network_tables.means(results),
    )
    for table in shown:
        lines += ["", *table.lines()] if table.rows else []
    return lines


def _plot(results: Results, directory: Path) -> None:
    from bench import plots, report

    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = plots.save_all(results, directory)
        report.write(results, paths, directory / REPORT)
    except OSError as error:
        raise RunError(f"--plots: cannot write to {directory}: {reason(error)}") from None
    print(f"\nSaved {', '.join(path.name for path in paths)} and {REPORT} in {directory}.")


def _save(results: Results, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        results.save(path)
    except OSError as error:
        raise RunError(f"--json: cannot write {path}: {reason(error)}") from None


def _load(option: str, path: Path) -> Results:
    try:
        return load(path)
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {reason(error)}") from None
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from None
