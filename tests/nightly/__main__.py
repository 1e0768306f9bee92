"""Runs the long checks one after the other, keeps their outcomes in results.json and writes CONTRIBUTING.md's table.

`python -m tests.nightly` runs all of them, `python -m tests.nightly fuzz large` those. Exits with 1 if one has failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from tests.nightly import record
from tests.nightly.parts import PARTS, Part


def run(part: Part) -> tuple[int, str, float]:
    """Run a part's session and echo its output. Returns its exit status, its output and the seconds that it took."""
    begin, lines = time.perf_counter(), []
    command = [sys.executable, "-m", "nox", "--non-interactive", "-s", part.session]
    options = {"cwd": record.ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **options) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines), time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nightly", description=__doc__)
    names = [part.session for part in PARTS]
    parser.add_argument("sessions", nargs="*", metavar="session", help=f"of {', '.join(names)}; all if none is given")
    wanted = parser.parse_args().sessions
    if unknown := set(wanted) - set(names):
        parser.error(f"expected sessions of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    where, new = record.surroundings(), []
    for part in PARTS:
        if part.session in wanted or not wanted:
            status, output, seconds = run(part)
            new.append(record.result(part, status, output, seconds, where))
            record.PAGE.write_text(record.with_table(record.PAGE.read_text(), record.save(new)))
    print(f"\n{record.table(new)}")
    return int(any(entry["outcome"] == "failed" for entry in new))


if __name__ == "__main__":
    sys.exit(main())
