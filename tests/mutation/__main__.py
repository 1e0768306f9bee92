"""Plants the faults of mutants.toml, each in a copy of the tree, and reports which of the selected tests notice.

A mutant is killed by a test that fails with it and passes without it, which is checked at the end. A mutant that does
not compile, or whose old text is not in the tree, is an error of the list. The checkout is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.mutation.mutants import GROUPS, ROOT, Mutant, Selection, load

BUILD = {
    "extension": ["setup.py", "-q", "build_ext", "--inplace"],
    "emulator": ["-c", "from tests.emulator import build; build.load()"],
}
SECONDS_OF_A_BUILD = 3600
EVERY_TEST = Selection(tuple(BUILD), ("tests",))


@dataclass(frozen=True)
class Failure:
    function: str  # or what a crash, a hang or a file that does not load is called
    implementation: str = ""
    test: str = ""  # with its parameters; "" where there is none to run again


@dataclass
class Result:
    mutant: Mutant
    outcome: str = "survived"  # or "killed", "killed once", "error"
    failures: list[Failure] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    implementations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""

    def settle(self) -> None:
        """Derive the outcome from the failures, unless it is an error."""
        self.functions = sorted({failure.function for failure in self.failures})
        self.implementations = sorted({failure.implementation for failure in self.failures} - {""})
        if self.outcome != "error":
            self.outcome = {0: "survived", 1: "killed once"}.get(len(self.functions), "killed")


class TreeError(Exception):
    """An error that makes a copy of the tree useless."""


class Tree:
    """One worker's copy: `folder/pristine`, built, and `folder/tree`, copied from it for each mutant.

    Times of files are copied too, so that a build sees nothing to do but the mutant. Both are built at the same path,
    since ninja knows files by their absolute names.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.path, self.pristine = folder / "tree", folder / "pristine"
        self.log = folder / "log.txt"
        # Python's cache of compiled modules tells files apart by size and second only.
        self.environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "FASTBN_CUDA": "0", "PYTHONPATH": "."}
        for threads in ("MAX_JOBS", "OMP_NUM_THREADS"):
            self.environment.setdefault(threads, str(max(1, (os.cpu_count() or 1) // jobs)))

    def prepare(self, builds: set[str]) -> None:
        """Bring the copy up to date with the checkout and build it."""
        if self.pristine.exists():
            self.restore()
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        files = {Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
        if "extension" not in builds:  # the one that the checkout's tests use
            files |= {path.relative_to(ROOT) for path in (ROOT / "fastbn").glob("*.so")}
        for path in files:
            target, content = self.path / path, (ROOT / path).read_bytes()
            if not target.exists() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        for existing in [path for folder in ("fastbn", "csrc", "tests") for path in (self.path / folder).rglob("*")]:
            if existing.is_file() and existing.suffix != ".so" and existing.relative_to(self.path) not in files:
                existing.unlink()
        for what in (what for what in BUILD if what in builds):  # the emulator needs the extension
            if not self.build(what):
                raise TreeError(f"the tree without a mutant does not build ({what}): see {self.log}")
        if self.python(["-c", "import fastbn"], 600) != 0:
            raise TreeError(f"fastbn does not load: expected it built in the checkout, see {self.log}")
        shutil.rmtree(self.pristine, ignore_errors=True)
        shutil.copytree(self.path, self.pristine)

    def restore(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.pristine, self.path)

    def python(self, arguments: list[str], seconds: float) -> int | None:
        """Run Python in the tree. Returns its exit status, or None where it took longer and was killed with its
        children.
        """
        with self.log.open("ab") as log:
            command = [sys.executable, *arguments]
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=self.path, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def build(self, what: str) -> bool:
        return self.python(BUILD[what], SECONDS_OF_A_BUILD) == 0

    def failures(self, arguments: list[str], enough: int, seconds: float) -> list[Failure]:
        """Return the failures of one run of pytest."""
        report = self.path.parent / "failures.json"
        report.write_text("")
        options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "tests.mutation.plugin"]
        options += [f"--failures={report}", f"--enough={enough}"]
        code = self.python(["-m", "pytest", *options, *arguments], seconds)
        failures = [Failure(*json.loads(line)) for line in report.read_text().splitlines()]
        if code is None:
            failures.append(Failure(f"takes longer than {seconds:.0f} s"))
        elif code == 5:
            raise TreeError(f"pytest found no test of {shlex.join(arguments)}")
        elif code not in (0, 1, 2) or (code and not failures):
            failures.append(Failure(f"pytest ends with {code}"))
        return failures


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def try_mutant(mutant: Mutant, selection: Selection, tree: Tree, options: argparse.Namespace) -> Result:
    result, start = Result(mutant), time.monotonic()
    tree.restore()
    target = tree.path / mutant.path
    try:
        target.write_text(mutant.apply(target.read_text()))
    except (OSError, ValueError) as error:
        return Result(mutant, "error", message=str(error))
    for what in selection.builds if mutant.path.startswith("csrc/") else ():
        if not tree.build(what):
            return Result(mutant, "error", message=f"does not build ({what}): see {tree.log}")
    for arguments in selection.tests:
        if len(result.functions) < options.enough:
            result.failures += tree.failures(shlex.split(arguments), options.enough, options.timeout)
            result.settle()
    result.seconds = time.monotonic() - start
    return result


def take_back_kills(results: list[Result], tree: Tree, seconds: float) -> None:
    """Run every test that killed a mutant without one. A test that fails there too has killed nothing."""
    tests = sorted({failure.test for result in results for failure in result.failures if failure.test})
    if not tests:
        return
    tree.restore()
    fail_anyway = {failure.function for failure in tree.failures(tests, 0, seconds)}
    for function in sorted(fail_anyway):
        say(f"fails without a mutant, and so kills none: {function}")
    for result in results:
        result.failures = [failure for failure in result.failures if failure.function not in fail_anyway]
        result.settle()


def line_of(result: Result) -> str:
    by = result.message
    if result.functions:
        names = [function.rsplit("/", 1)[-1] for function in result.functions]
        by = f"{len(names)}: {', '.join(names)}"
        by += f" [{', '.join(result.implementations)}]" if result.implementations else ""
    return f"{result.mutant.name:44} {result.outcome:11} {result.seconds:6.0f} s  {by}"


def print_table(results: list[Result], tests: dict[str, Selection], enough: int) -> None:
    print(f"\nOnly selected tests were run, and no more of them once {enough} functions had failed:")
    for name in sorted({result.mutant.tests for result in results}):
        print(f"  {name}: " + "; ".join(" ".join(arguments.split()) for arguments in tests[name].tests))
    for group in GROUPS:
        of_group = [result for result in results if result.mutant.group == group]
        if of_group:
            print(f"\n{group}")
        for result in of_group:
            print(f"  {line_of(result)}")
            print(f"  {'':44} {result.mutant.path}: {result.mutant.why}")
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


OUTCOMES = ("killed", "killed once", "survived", "error")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and plant none")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--group", nargs="+", choices=GROUPS, help="mutants of these parts of the tree")
    parser.add_argument("--all-tests", action="store_true", help="ask every test, not those selected for the mutant")
    parser.add_argument(
        "--enough",
        type=int,
        default=2,
        help="failing test functions after which a mutant is done with (default 2)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each in a copy of its own (default 1)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a run of pytest (default 900)")
    parser.add_argument("--folder", type=Path, help="where the copies go and stay, built; else a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    mutants, selections = load()
    if unknown := set(options.only or ()) - {mutant.name for mutant in mutants}:
        raise SystemExit(f"--only: expected names that --list prints, got {', '.join(sorted(unknown))}")
    chosen = [
        mutant
        for mutant in mutants
        if (not options.only or mutant.name in options.only) and (not options.group or mutant.group in options.group)
    ]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:44} {mutant.path}: {mutant.why}")
        return 0
    if options.all_tests:
        selections = dict.fromkeys(selections, EVERY_TEST)
    builds = {what for mutant in chosen if mutant.path.startswith("csrc/") for what in selections[mutant.tests].builds}
    with tempfile.TemporaryDirectory(prefix="fastbn-mutation-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        trees: queue.Queue[Tree] = queue.Queue()
        for worker in range(options.jobs):
            (folder / str(worker)).mkdir(parents=True, exist_ok=True)
            tree = Tree(folder / str(worker), options.jobs)
            try:
                tree.prepare(builds)
            except TreeError as error:
                raise SystemExit(f"{error}\n{tree.log.read_text()[-2000:]}") from None
            trees.put(tree)

        def run(mutant: Mutant) -> Result:
            tree = trees.get()
            try:
                result = try_mutant(mutant, selections[mutant.tests], tree, options)
            except TreeError as error:
                result = Result(mutant, "error", message=str(error))
            finally:
                trees.put(tree)
            say(line_of(result))
            return result

        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(run, chosen))
        take_back_kills(results, trees.get(), options.timeout)
    print_table(results, selections, options.enough)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return int(any(result.outcome in ("survived", "error") for result in results))


if __name__ == "__main__":
    sys.exit(main())
