"""`python -m tests.fuzz`: many cases in two processes, a summary, and exit status 1 if there are faults."""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import secrets
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from tests import implementations
from tests.fuzz.run import Summary, run

PROCESSES = 2


def _work(count: int, seed: int, implementation: str, progress: Path) -> Summary:
    faulthandler.enable()
    torch.set_num_threads(1)
    return run(count, seed, implementation, before_case=lambda case: progress.write_text(case.code()))


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
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool,
    ):
        files = [Path(folder) / f"{i}.py" for i in range(PROCESSES)]
        share = -(-options.cases // PROCESSES)
        jobs = [pool.submit(_work, share, seed + i, options.implementation, files[i]) for i in range(PROCESSES)]
        for job, file in zip(jobs, files, strict=True):
            try:
                total.merge(job.result())
            except BrokenProcessPool:
                died.append(file.read_text() if file.exists() else "(before the first case)")
    total.seconds = time.perf_counter() - begin
    print(total.text())
    for code in died:  # one of them killed the pool, and so the other process
        print("\nA PROCESS DIED in one of these cases\n" + code)
    return 1 if total.found or died else 0


if __name__ == "__main__":
    sys.exit(main())
