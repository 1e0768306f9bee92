"""Checks that several processes run together on gloo, as one spawn of them, and what each check came to."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

# A rank that waits for one that failed ends with an error after this time.
TIMEOUT = timedelta(seconds=30)
PASSED = "passed"

Check = Callable[[int, int], None]


def run(
    checks: dict[str, Check], size: int, folder: Path, deadline: float = 300, timeout: timedelta = TIMEOUT
) -> dict[str, list[str | None]]:
    """Run each check in `size` processes, in the order of `checks`; return by name what it came to in each process.

    That is "passed", the text of a failure, or None where the process did not come to the end of the check: after a
    failure no other check is run, since ranks may no longer be in the same place, and what has not ended when
    `deadline` seconds have passed is killed. A check is a function of rank and size that stands in a module.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(checks, rank, size, folder, timeout)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + deadline
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return {name: [_read(folder / f"{name}.{rank}") for rank in range(size)] for name in checks}


def assert_passed(texts: list[str | None]) -> None:
    """Assert that a check passed in each process. The message begins with those that did not just miss another."""
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text != PASSED]
    assert not failures, "\n".join(sorted(failures, key=lambda text: "gloo" in text))


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _work(checks: dict[str, Check], rank: int, size: int, folder: Path, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh tensors with NaN
    store = (folder / "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    for name, check in checks.items():
        try:
            check(rank, size)
            text = PASSED
        except BaseException:
            text = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(text)
        if text != PASSED:
            return
    with contextlib.suppress(RuntimeError):  # a check may have let a rank die
        distributed.barrier()
        distributed.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """Return the `value` of each rank."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
