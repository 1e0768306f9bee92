"""Simulates the scheduler of a quarter of an SM while each of its warps runs the same loop.

A cycle issues at most one instruction. A warp's instructions issue in order: the stall count of the one before has
passed, the scoreboards that it waits for are clear, and its pipe is free. Among the warps that can issue, the one that
issued last goes on unless its instruction yields, or it has got iterations ahead, as barriers would not let it; else
the one that has waited longest goes. Where the four schedulers of an SM run the same loop, each gets a quarter of the
SM's path to memory, in front of which instructions queue up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bench.model import pipes
from bench.model.sass import INSTRUCTION_BYTES, SCOREBOARDS, Instruction

WARM_UP_ITERATIONS = 10
ITERATIONS = 30  # that are measured, of the warp that is last
MAX_AHEAD = 1  # iterations
START_CYCLES = 37  # between the starts of two warps: they do not run in step


@dataclass(frozen=True)
class _Step:
    """What the simulation needs of an instruction."""

    pipe: str
    cycles: float
    latency: float
    stall: int
    yields: bool
    write_scoreboard: int | None
    read_scoreboard: int | None
    operands_read: float
    wait: tuple[int, ...]


def _steps_of(
    path: Sequence[Instruction], dead: Collection[int], latency: dict[str, int], schedulers: int
) -> list[_Step]:
    steps = []
    for index, instruction in enumerate(path):
        off = instruction.address in dead or instruction.predicate == "@!PT"
        use = pipes.Use("control", pipes.ISSUE) if off else pipes.use_of(instruction)
        following = path[(index + 1) % len(path)]
        taken = instruction.name == "BRA" and following.address != instruction.address + INSTRUCTION_BYTES
        steps.append(
            _Step(
                use.pipe,
                use.cycles * (schedulers if use.pipe == "memory" else 1),
                pipes.SWITCHED_OFF if off else latency.get(instruction.name, pipes.latency_of(instruction)),
                max(1, instruction.stall) + (pipes.TAKEN_BRANCH if taken else 0),
                instruction.yields,
                instruction.write_scoreboard,
                instruction.read_scoreboard,
                pipes.SWITCHED_OFF if off else pipes.OPERANDS_READ,
                instruction.wait,
            )
        )
    return steps


class _Warp:
    def __init__(self, start: float) -> None:
        self.position = 0
        self.iterations = 0
        self.ready = start
        self.issued = start
        self.scoreboards = [0.0] * SCOREBOARDS


def cycles_per_iteration(
    path: Sequence[Instruction],
    warps: int,
    dead: Collection[int] = (),
    latency: dict[str, int] | None = None,
    schedulers: int = pipes.SCHEDULERS,
) -> float:
    """Return the cycles in which a scheduler with `warps` warps runs one iteration of each of them.

    `path` are the instructions of an iteration in order, `dead` the addresses of those whose predicate is false, and
    `latency` replaces latencies of pipes.LATENCY by name. `schedulers` of the SM run the loop.
    """
    steps = _steps_of(path, dead, latency or {}, schedulers)
    states = [_Warp(START_CYCLES * index) for index in range(warps)]
    free: dict[str, float] = {}
    now, last = 0.0, None
    finished, begin, begin_finished = 0, 0.0, 0
    ahead = False

    def earliest(warp: _Warp) -> float:
        step = steps[warp.position]
        time = max([warp.ready, *(warp.scoreboards[index] for index in step.wait)])
        pipe_free = free.get(step.pipe, 0.0)
        # The path to memory takes instructions into its queue.
        return max(time, pipe_free - pipes.MEMORY_QUEUE * step.cycles if step.pipe == "memory" else pipe_free)

    while True:
        times = [earliest(warp) for warp in states]
        if last is not None and times[last] <= now and not steps[states[last].position - 1].yields and not ahead:
            chosen = last
        else:
            now = max(now, min(times))
            able = [index for index, time in enumerate(times) if time <= now]
            chosen = min(able, key=lambda index: states[index].issued)
        warp, last = states[chosen], chosen
        step = steps[warp.position]
        start = max(now, free.get(step.pipe, 0.0))
        free[step.pipe] = start + step.cycles
        if step.write_scoreboard is not None:
            board = step.write_scoreboard
            warp.scoreboards[board] = max(warp.scoreboards[board], start + step.latency)
        if step.read_scoreboard is not None:
            board = step.read_scoreboard
            warp.scoreboards[board] = max(warp.scoreboards[board], start + step.operands_read)
        warp.ready, warp.issued = now + step.stall, now
        now += 1
        warp.position += 1
        ahead = False
        if warp.position == len(steps):
            warp.position = 0
            warp.iterations += 1
            finished += 1
            ahead = warp.iterations > min(state.iterations for state in states) + MAX_AHEAD
            if begin == 0 and min(state.iterations for state in states) >= WARM_UP_ITERATIONS:
                begin, begin_finished = now, finished
            if min(state.iterations for state in states) >= WARM_UP_ITERATIONS + ITERATIONS:
                return (now - begin) * warps / (finished - begin_finished)
