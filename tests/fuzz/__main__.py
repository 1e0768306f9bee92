"""Runs many cases, a process per core, and prints a summary; exits with 1 if there are faults. `python -m tests.fuzz`.

The cases of a seed are the same for any number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests import implementations
from tests.fuzz.run import BATCH, Summary, run_alone


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="drawn if not given; printed")
    parser.add_argument("--processes", type=int, default=cores(), help="one per core if not given")
    parser.add_argument("--implementation", default="cpu", choices=[n for n in implementations.NAMES if n != "cuda"])
    options = parser.parse_args()
    if options.cases < 1 or options.processes < 1:
        parser.error(f"expected cases and processes to be positive, got {options.cases} and {options.processes}")
    processes = min(options.processes, -(-options.cases // BATCH))
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    again = f"--implementation {options.implementation} --cases {options.cases} --seed {seed}"
    print(f"seed {seed}: python -m tests.fuzz {again}", flush=True)
    begin = time.perf_counter()
    implementations.load(options.implementation)  # the emulator is built once
    total, died = Summary(), []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        jobs = []
        for i in range(processes):  # each in its own pool, so that a process that dies takes no other with it
            pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            file = folder / f"{i}.py"
            arguments = options.cases, seed, options.implementation, file, (i, processes)
            jobs.append((file, pool.submit(run_alone, *arguments)))
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
