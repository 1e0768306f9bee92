"""What a hot loop must not contain: for tests that hold kernels to it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.model.hot_loops import ACCESS_BYTES, HotLoop
from bench.model.pipes import access_bytes
from bench.model.sass import Instruction

LANES = 32

# By name: constants that belong in registers, fences, cache control, and local memory, which is where spills go.
FORBIDDEN = ("LDC", "ULDC", "MEMBAR", "ERRBAR", "CCTL", "LDL", "STL")
# Second halves of 64-bit additions and products, by the opcode with its modifiers. IMAD.WIDE is a whole one by itself.
ADDRESS_ARITHMETIC = re.compile(r"U?(LEA\.HI|IADD3?\.X|IMAD\.X|IMAD\.HI|SHF\.[LR]\.[SU]64\.HI)\b")

_ADDRESS = re.compile(
    r"\[(?P<base>U?R\d+|URZ|RZ)(?:\.\w+)*(?:\+(?P<uniform>UR\d+|URZ))?(?:\+?(?P<offset>-?0x[0-9a-f]+))?\]"
)
_ACCESSES = ("LDS", "STS", "LDG", "STG", "LD", "ST", "LDGSTS")


def forbidden(loop: HotLoop) -> list[str]:
    """Return the opcodes of a loop that it should do without, in the order in which they run."""
    return [
        instruction.opcode
        for instruction in loop.instructions
        if instruction.address not in loop.dead
        and (instruction.name in FORBIDDEN or ADDRESS_ARITHMETIC.match(instruction.opcode))
    ]


def _accesses(loop: HotLoop) -> list[Instruction]:
    """Return a loop's accesses to shared and global memory that move something."""
    return [
        instruction
        for instruction in loop.instructions
        if instruction.name in _ACCESSES and instruction.address not in loop.dead and instruction.predicate != "@!PT"
    ]


def narrow_accesses(loop: HotLoop) -> list[str]:
    """Return the accesses that move fewer than 16 bytes per lane."""
    return [f"{i.opcode} {i.operands}" for i in _accesses(loop) if access_bytes(i) < ACCESS_BYTES]


def _writes(instruction: Instruction) -> set[str]:
    """Return the registers that an instruction may write: as many from its first operand on as a result may have."""
    if instruction.name in ("STS", "STG", "ST", "LDGSTS", "BRA"):
        return set()
    match = re.match(r"(U?R)(\d+)", instruction.operands)
    if match is None:
        return set()
    count = max(1, access_bytes(instruction) // 4) if instruction.name in _ACCESSES else 2
    return {f"{match[1]}{int(match[2]) + k}" for k in range(count)}


def lane_strides(loop: HotLoop) -> list[str]:
    """Return the pairs of accesses by which a thread moves neighbouring vectors of 16 bytes, so that lanes do not.

    The machine code shows the distance of two accesses if they have the same base register, and it has not been written
    between them. If neighbouring lanes are 16 bytes apart, a thread's next vector is a multiple of a warp's 512 bytes
    away. How far lanes are apart is not in the code as such: a run in which every lane's addresses are seen tells.
    """
    wrong: list[str] = []
    last: dict[tuple[str, str | None], tuple[str, int]] = {}
    for instruction in loop.instructions:
        if instruction.name in _ACCESSES and instruction.address not in loop.dead:
            for match in _ADDRESS.finditer(instruction.operands):
                offset = int(match["offset"] or "0", 16)
                key = match["base"], match["uniform"]
                before = last.get(key)
                if before is not None and (offset - before[1]) % (LANES * ACCESS_BYTES) != 0:
                    wrong.append(f"{before[0]} and {instruction.opcode} {instruction.operands}")
                last[key] = f"{instruction.opcode} {instruction.operands}", offset
        written = _writes(instruction)
        last = {key: value for key, value in last.items() if not written & set(filter(None, key))}
    return wrong


def problems(loops: Iterable[HotLoop], max_instructions: float) -> list[str]:
    """Return what is wrong with the loops of one kernel that visit the same vectors in turn: together they may take
    `max_instructions` per vector of 8."""
    loops = list(loops)
    found = []
    total = sum(loop.instructions_per_vector for loop in loops)
    if total > max_instructions:
        found.append(f"expected at most {max_instructions:g} instructions per vector, got {total:.1f}")
    for loop in loops:
        found += [f"{loop.name}: {opcode}" for opcode in forbidden(loop)]
        found += [f"{loop.name}: {access} moves fewer than 16 bytes per lane" for access in narrow_accesses(loop)]
        found += [f"{loop.name}: a lane moves neighbouring vectors, {pair}" for pair in lane_strides(loop)]
    return found
