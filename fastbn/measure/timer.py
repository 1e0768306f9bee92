"""The one timer: calls take turns in rounds, so that drift of the machine reaches all of them alike.

The order changes from round to round, so that no call always follows the same other one. A clock times one sample.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastbn._torch import spin

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Microseconds per call over `rounds` samples: median, 20th and 80th percentile."""

    median_us: float
    p20_us: float
    p80_us: float
    rounds: int


@dataclass(frozen=True)
class Budget:
    """The length of a measurement.

    Rounds end after `seconds` per call that takes part, but not before `min_rounds` nor after `max_rounds`. On two
    cores of a shared machine that keeps the ratio of two equal calls within 3 percent nine times in ten:
    bench/results/cpu-against-itself.json.
    """

    seconds: float = 0.15
    warm_up_seconds: float = 0.02
    min_rounds: int = 15
    max_rounds: int = 401


class HostClock:
    """A clock on the host: perf_counter around as many calls as take `sample_seconds`, after one that is not timed.

    Caches and allocator then hold the implementation's own data, whichever ran before.
    """

    sample_seconds = 3e-4

    def prepare(self, host_seconds: Sequence[float]) -> None:
        # All take the same number, so that samples of all implementations are equally exposed to interrupts.
        self._calls = max(1, round(self.sample_seconds / statistics.mean(host_seconds)))

    def sample(self, call: Call) -> Callable[[], float]:
        calls = self._calls
        call()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds

    def wait(self) -> None:
        pass


class CudaClock:
    """A clock on the device: CUDA events on the current stream around one call, with L2 flushed before it.

    A spin on the device lets the host enqueue the entire call first, so that the events bracket device time and no wait
    for the host.
    """

    # Bytes read to flush L2: twice B200's, the largest known.
    flush_bytes = 256 * 2**20
    # Cycles per second, more than GPUs run at; a slower clock makes the spin longer, which only costs time.
    cycles_per_second = 3e9
    head_start = 1.5
    enqueue_seconds = 50e-6
    # If the host was interrupted, the sample includes a wait for it. It is taken again after a longer spin.
    tries = 5

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        # Flush by reading: dirty lines would be written back during the call.
        self._flush = torch.zeros(max(self.flush_bytes, 4 * l2_bytes) // 4, dtype=torch.float32, device="cuda")

    def prepare(self, host_seconds: Sequence[float]) -> None:
        seconds = self.head_start * max(host_seconds) + self.enqueue_seconds
        self._spin_cycles = int(seconds * self.cycles_per_second)

    def sample(self, call: Call) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.tries):
            self._flush.sum()
            spin(self._spin_cycles)
            start.record()
            call()
            end.record()
            if not start.query():  # the device still spins, and everything is in its queue
                break
            self._spin_cycles *= 2
        return lambda: start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


class IdleClock:
    """A clock on the host around one call that finds the device idle.

    It stops at the return of the call, or with `to_the_end` when the device is idle again, which is what a training
    step takes. It neither flushes nor spins: a host too slow to feed the device counts.
    """

    def __init__(self, device: torch.device, to_the_end: bool) -> None:
        self._device, self._to_the_end = device, to_the_end

    def prepare(self, host_seconds: Sequence[float]) -> None:
        pass

    def sample(self, call: Call) -> Callable[[], float]:
        self.wait()
        start = time.perf_counter()
        call()
        if self._to_the_end:
            self.wait()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


Clock = HostClock | CudaClock | IdleClock


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


def time_in_turns(calls: Sequence[Call], clock: Clock, budget: Budget = Budget()) -> list[list[float]]:
    """Return the seconds of each of `calls`, one list per call and one number per round, after a warm-up by time."""
    with _without_garbage_collection():
        clock.prepare([_warm_up(call, clock, budget) for call in calls])
        samples: list[list[float]] = [[] for _ in calls]
        orders = _orders(len(calls))
        start = time.perf_counter()
        for number in range(budget.max_rounds):
            if number >= budget.min_rounds and time.perf_counter() - start > budget.seconds * len(calls):
                break
            pending = [(index, clock.sample(calls[index])) for index in next(orders)]
            clock.wait()
            for index, seconds in pending:
                samples[index].append(seconds())
    return samples


def summarize(samples: Sequence[float]) -> Times:
    """Return median and percentiles (linear between samples) of seconds per call."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(1e6 * statistics.median(samples), 1e6 * p20, 1e6 * p80, len(samples))


def speedup(samples: Sequence[float], rival: Sequence[float]) -> float:
    """Return the median over the rounds of the rival's time over this one's: drift from round to round cancels."""
    return speedup_and_spread(samples, rival)[0]


def speedup_and_spread(samples: Sequence[float], rival: Sequence[float]) -> tuple[float, float, float]:
    """Return `speedup` and the 20th and 80th percentile of the ratios of which it is the median."""
    ratios = [theirs / ours for ours, theirs in zip(samples, rival, strict=True)]
    p20, _, _, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
    return statistics.median(ratios), p20, p80


def _orders(number: int) -> Iterator[list[int]]:
    """Yield shuffled orders of 0 .. number-1 without end, the same each time; none begins with the last of the one
    before.

    A call finds in caches and allocator what the call before it left, so after itself it would be faster than the
    others.
    """
    rng, order = random.Random(0), list(range(number))
    while True:
        last = order[-1]
        rng.shuffle(order)
        if number > 1 and order[0] == last:
            order.append(order.pop(0))
        yield list(order)


def _warm_up(call: Call, clock: Clock, budget: Budget) -> float:
    """Run for the warm-up time of the budget. Returns the shortest host seconds of a call."""
    shortest, calls = float("inf"), 0
    start = time.perf_counter()
    while calls < 2 or time.perf_counter() - start < budget.warm_up_seconds:
        clock.wait()
        before = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - before)
        calls += 1
    clock.wait()
    return shortest


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
