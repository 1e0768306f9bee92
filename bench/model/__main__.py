"""The command `python -m bench.model`: loops, fit, predict."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from bench.model import constants, fit, measurements, predict, search, table
from bench.model.marks import Mark
from bench.model.planner import planned
from bench.model.provenance import git_revision, tool_version

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The hot loops of the kernels in RESULTS, which are gone, and of today's.
MEASURED_LOOPS = HERE / "measured_loops.json"
CURRENT_LOOPS = HERE / "loops.json"
RESULTS = ROOT / "bench" / "results" / "h200-plans.csv"


def _loops(options: argparse.Namespace) -> None:
    marks = None
    if options.marks:
        marks = [Mark(**mark) for mark in json.loads(options.marks.read_text())["marks"]]
    records = table.loops_of_sources(options.source.resolve(), marks, options.arch)
    print(table.text(records))
    if options.json:
        provenance = {
            "command": "python -m bench.model " + " ".join(options.words),
            "revision": git_revision(options.source),
            "arch": f"sm_{options.arch}",
            "nvcc": tool_version("nvcc"),
            "nvdisasm": tool_version("nvdisasm"),
        }
        table.write(options.json, records, provenance)


def _fit(options: argparse.Namespace) -> None:
    measured = measurements.read(options.csv)
    loops = table.read(options.loops)
    found = fit.fit(measured, loops, constants.read() if constants.FITTED.exists() else None)
    for name, value in dataclasses.asdict(found).items():
        print(f"{name:28s} {value:8.4g}")
    print(f"\n{'family':12s} {'plans':>6s} {'error':>7s} {'p90':>7s} {'bias':>7s}")
    errors = fit.errors(measured, loops, found)
    for family, error in errors.items():
        print(f"{family:12s} {error.plans:6d} {error.mean:7.1%} {error.p90:7.1%} {error.bias:+7.1%}")
    if not options.dry_run:
        machine = next((line[1:].strip() for line in options.csv.read_text().splitlines() if line.startswith("#")), "")
        provenance = {
            "command": "python -m bench.model " + " ".join(options.words),
            "machine": machine,
            "errors": {family: dataclasses.asdict(error) for family, error in errors.items()},
        }
        constants.write(constants.FITTED, found, provenance)


def _predict(options: argparse.Namespace) -> None:
    measured = measurements.read(options.csv)
    known = constants.read()
    if not options.loops.exists():
        sys.exit(f"{options.loops}: expected what `python -m bench.model loops --json {options.loops}` writes")
    loops = table.with_missing(table.read(options.loops), table.read(MEASURED_LOOPS))
    if options.plans == "model":
        print("Plans: those that the model finds best, not the planner's.")

    scenarios = [dataclasses.replace(known, **scenario) for scenario in (predict.BASE, predict.PESSIMISTIC)]

    def plan_of(case: measurements.Case) -> dict[str, object]:
        found = search.best_plan(case, loops, scenarios) if options.plans == "model" else None
        return found or planned(case)

    print(predict.report(measured, plan_of, loops, known, options.cases))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    commands = parser.add_subparsers(required=True)

    loops = commands.add_parser("loops", help="compile the kernels and tabulate their hot loops")
    loops.add_argument("--source", type=Path, default=ROOT / "csrc", help="the folder csrc of a clone")
    loops.add_argument("--marks", type=Path, help="a file of marks, for sources that have none")
    loops.add_argument("--arch", default="90")
    loops.add_argument("--json", type=Path, help="also write the table to this file")
    loops.set_defaults(run=_loops)

    fitted = commands.add_parser("fit", help="fit the constants to a CSV of bench/plans.cu, and write them")
    fitted.add_argument("csv", type=Path)
    fitted.add_argument("--loops", type=Path, default=MEASURED_LOOPS, help="the hot loops of the kernels in the CSV")
    fitted.add_argument("--dry-run", action="store_true", help="only print them")
    fitted.set_defaults(run=_fit)

    predicted = commands.add_parser("predict", help="predict the shares of copy that have targets")
    predicted.add_argument("--csv", type=Path, default=RESULTS, help="the measured times of copies and of other plans")
    predicted.add_argument("--loops", type=Path, default=CURRENT_LOOPS, help="the hot loops of today's kernels")
    predicted.add_argument("--plans", choices=("planner", "model"), default="planner")
    predicted.add_argument("--cases", action="store_true", help="also what bounds each case")
    predicted.set_defaults(run=_predict)
    return parser


def main(words: list[str]) -> None:
    options = _parser().parse_args(words)
    options.words = words
    options.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
