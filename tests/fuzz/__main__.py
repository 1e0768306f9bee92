"""Runs many cases in two processes and prints a summary; exits with 1 if there are faults. `python -m tests.fuzz`."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests import implementations
from tests.fuzz.run import Summary, run_alone

PROCESSES = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="drawn if not given; printed")
    parser.add_argument("--implementation", default="cpu", choices=[n for n in implementations.NAMES if n != "cuda"])
    options = parser.parse_args()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    begin = time.perf_counter()
    implementations.load(options.implementation)  # the emulator is built once
    total, died = Summary(), []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        jobs = []
        for i in range(PROCESSES):  # each in its own pool, so that a process that dies takes no other with it
            pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            file, number = folder / f"{i}.py", options.cases // PROCESSES + (i < options.cases % PROCESSES)
            jobs.append((file, pool.submit(run_alone, number, seed + i, options.implementation, file)))
        for file, job in jobs:
            try:
                total.merge(job.result())
            except BrokenProcessPool:
                died.append(file.read_text() if file.exists() else "(before the first case)")
    total.seconds = time.perf_counter() - begin
    print(total.text())
    for code in died:
        print(f"\nFAULT: the process died in\n{code}")
    return 1 if total.found or died else 0


if __name__ == "__main__":
    sys.exit(main())
