"""The control flow of a function: basic blocks, natural loops, and the path of a loop's steady state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.model.sass import Instruction

# Instructions of a cold path count against a path as hot ones count for it, since nvcc may give an instruction that
# two paths share to either.
COLD_WEIGHT = -1.0
# Of two paths with the same hot instructions, the steady state takes the shorter one.
OTHER_WEIGHT = -0.01

_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT", "KILL")


@dataclass(frozen=True)
class Block:
    """Instructions `first` to `last` of a function, by index, and the blocks that may follow."""

    first: int
    last: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: the blocks from which its head is reached again without leaving it."""

    head: int
    latches: tuple[int, ...]
    blocks: frozenset[int]


def _always(instruction: Instruction) -> bool:
    return not instruction.predicate and instruction.operands.startswith("`")


def blocks_of(instructions: Sequence[Instruction]) -> list[Block]:
    """Return the basic blocks, in order of their addresses. Calls return; indirect branches lead nowhere."""
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    starts = {0}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(index_of[instruction.target])
        if instruction.target is not None or instruction.name in _ENDS:
            starts.add(index + 1)
    ordered = sorted(start for start in starts if start < len(instructions))
    number_of = {start: number for number, start in enumerate(ordered)}
    blocks = []
    for first, after in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        last = instructions[after - 1]
        following = [number_of[after]] if after in number_of else []
        if last.target is not None:
            target = number_of[index_of[last.target]]
            following = [target] if _always(last) else [target, *following]
        elif last.name in _ENDS and not last.predicate:
            following = []
        blocks.append(Block(first, after - 1, tuple(dict.fromkeys(following))))
    return blocks


def _back_edges(blocks: Sequence[Block]) -> set[tuple[int, int]]:
    """Return the edges that lead to a block that is still being visited, in a depth-first search from every root."""
    targets = {successor for block in blocks for successor in block.successors}
    roots = [0, *(number for number in range(len(blocks)) if number not in targets), *range(len(blocks))]
    found, done, open_blocks = set(), set(), set()
    for root in roots:
        if root in done:
            continue
        stack = [(root, iter(blocks[root].successors))]
        open_blocks.add(root)
        while stack:
            number, successors = stack[-1]
            for successor in successors:
                if successor in open_blocks:
                    found.add((number, successor))
                elif successor not in done:
                    open_blocks.add(successor)
                    stack.append((successor, iter(blocks[successor].successors)))
                    break
            else:
                stack.pop()
                open_blocks.discard(number)
                done.add(number)
    return found


def loops_of(blocks: Sequence[Block]) -> list[Loop]:
    """Return the natural loops. Back edges to the same head are one loop."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(number)
    latches: dict[int, list[int]] = {}
    for latch, head in _back_edges(blocks):
        latches.setdefault(head, []).append(latch)
    loops = []
    for head, ends in sorted(latches.items()):
        inside, stack = {head}, list(ends)
        while stack:
            number = stack.pop()
            if number not in inside:
                inside.add(number)
                stack.extend(predecessors[number])
        loops.append(Loop(head, tuple(sorted(ends)), frozenset(inside)))
    return loops


def steady_path(
    instructions: Sequence[Instruction],
    blocks: Sequence[Block],
    loops: Sequence[Loop],
    loop: Loop,
    weight: Callable[[Instruction], float],
) -> list[Instruction]:
    """Return what one iteration of a loop runs in its steady state: the path from its head to its back edge on which
    the weights of the instructions add up to the most.

    Weights are positive for hot instructions, COLD_WEIGHT for those of a cold path, and OTHER_WEIGHT for the rest: so
    the path skips whatever it can skip, unless that is hot. A loop within the loop is cold, too: it retries, or does
    what is left over. If it cannot be skipped, it is passed once.
    """
    back = {(latch, inner.head) for inner in loops for latch in inner.latches}
    within = {number for inner in loops if inner.blocks < loop.blocks for number in inner.blocks}
    best: dict[int, tuple[float, int | None]] = {}

    # Blocks in an order in which every one comes after those that it leads to.
    order: list[int] = []
    seen: set[int] = set()
    stack: list[tuple[int, bool]] = [(loop.head, False)]
    while stack:
        number, expanded = stack.pop()
        if expanded:
            order.append(number)
        elif number not in seen:
            seen.add(number)
            stack.append((number, True))
            stack.extend((s, False) for s in blocks[number].successors if s in loop.blocks and (number, s) not in back)

    for number in order:
        block = blocks[number]
        body = instructions[block.first : block.last + 1]
        own = COLD_WEIGHT * len(body) if number in within else sum(weight(instruction) for instruction in body)
        choices = [(0.0, None)] if number in loop.latches else []
        choices += [
            (best[successor][0], successor)
            for successor in block.successors
            if successor in best and (number, successor) not in back
        ]
        if choices:
            rest, following = max(choices, key=lambda choice: choice[0])
            best[number] = (own + rest, following)

    path: list[Instruction] = []
    following: int | None = loop.head
    while following is not None:
        block = blocks[following]
        path += instructions[block.first : block.last + 1]
        following = best[following][1]
    return path
