"""What an instruction occupies while a warp's 32 lanes execute it, and how long a result takes.

Throughputs are those of the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide for
compute capability 9.0, as the cycles for which a warp occupies its scheduler's pipe: 32 lanes divided by a quarter of
the results per cycle and SM. Where it has no row, and for all latencies, a comment says what is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.model.sass import Instruction

SCHEDULERS = 4  # per SM

# Cycles of a scheduler's own pipe per warp.
FMA = 1  # 128 additions, multiplications or multiply-adds of float32 per cycle and SM
IMAD = 2  # 64 multiply-adds of int32: one half of the FMA pipe
ALU = 2  # 64 integer additions, comparisons, shifts, logical operations and permutations
PACK = 2  # 64 conversions from float32 to 16-bit types
FP64 = 2  # 64 additions, multiplications or multiply-adds of float64
XU = 8  # 16 reciprocals, logarithms or conversions that involve 64-bit types
SHUFFLE = 4  # 32 shuffles: they go through the SM's one path to memory
UNIFORM = 2  # assumed: half a warp instruction per cycle, as the ALU's
ISSUE = 1

# Cycles of the SM's one path to memory per warp: it moves 128 bytes per cycle to and from shared memory, and 64 bytes
# per cycle to and from L2. The two cycles of an asynchronous copy beside its write to shared memory are assumed.
SHARED_BYTES_PER_CYCLE = 128
GLOBAL_BYTES_PER_CYCLE = 64
COPY_REQUEST = 2
CONSTANT_LOAD = 1
OTHER_MEMORY = 2

# Instructions that may wait in front of the path to memory before a scheduler's next one stalls; assumed.
MEMORY_QUEUE = 8

# Cycles from issue until the scoreboard of the result clears. All are assumed, of the order that microbenchmarks of
# Hopper found (arXiv 2402.13499).
LATENCY = {
    "LDS": 33,
    "LDC": 30,
    "ULDC": 30,
    "LDG": 600,  # from memory, without load
    "LD": 600,
    "SHFL": 25,
    "MUFU": 24,
    "F2F": 24,
    "I2F": 24,
    "F2I": 24,
    "S2R": 30,
    "SYNCS": 30,  # a try_wait that succeeds at once
    "ATOMS": 60,
    "R2UR": 12,
}
OTHER_LATENCY = 12
OPERANDS_READ = 14  # until the scoreboard of the operands clears; assumed
SWITCHED_OFF = 2  # either scoreboard, of an instruction whose predicate is false; assumed

# Cycles that a taken branch adds to its stall count; assumed. There is no model of the instruction cache.
TAKEN_BRANCH = 10


@dataclass(frozen=True)
class Use:
    """The pipe that an instruction occupies, and for how many cycles: of a scheduler, or of the SM for `memory`."""

    pipe: str
    cycles: float


_FMA = {"FFMA", "FADD", "FMUL", "FFMA32I", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
_IMAD = {"IMAD", "XMAD", "IMAD32I"}
_PACK = {"F2FP", "I2FP"}
_FP64 = {"DADD", "DFMA", "DMUL", "DSETP", "DMNMX"}
_XU = {"MUFU", "F2F", "I2F", "F2I", "FRND", "POPC", "FLO", "BREV"}
_CONTROL = {
    *("BRA", "BSSY", "BSYNC", "BREAK", "BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "NOP", "EXIT", "CALL", "RET", "YIELD"),
    *("BMOV", "BRX", "NANOSLEEP", "ARRIVES", "MEMBAR", "ERRBAR", "CCTL", "VOTEU", "ACQBULK", "UCGABAR_ARV"),
}
_SHARED = {"LDS", "STS", "LDSM", "STSM"}
_GLOBAL = {"LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG", "LDL", "STL"}
_OTHER_MEMORY = {"ATOMS", "S2R", "S2UR", "SYNCS", "MATCH", "UBLKCP", "UTMALDG"}


def access_bytes(instruction: Instruction) -> int:
    """Return the bytes per lane that a load or store moves."""
    for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if modifier in instruction.modifiers:
            return size
    return 4


def use_of(instruction: Instruction) -> Use:
    """Return what an instruction occupies if its predicate is true."""
    name = instruction.name
    if instruction.predicate == "@!PT" or name in _CONTROL:
        return Use("control", ISSUE)
    bytes_per_warp = 32 * access_bytes(instruction)
    if name in _SHARED:
        return Use("memory", max(1.0, bytes_per_warp / SHARED_BYTES_PER_CYCLE))
    if name in _GLOBAL:
        return Use("memory", max(1.0, bytes_per_warp / GLOBAL_BYTES_PER_CYCLE))
    if name == "LDGSTS":
        return Use("memory", bytes_per_warp / SHARED_BYTES_PER_CYCLE + COPY_REQUEST)
    if name == "LDC":
        return Use("memory", CONSTANT_LOAD)
    if name == "SHFL":
        return Use("memory", SHUFFLE / SCHEDULERS)
    if name in _OTHER_MEMORY:
        return Use("memory", OTHER_MEMORY)
    if name in _FMA:
        return Use("fma", FMA)
    if name in _IMAD:
        return Use("fma", IMAD)
    if name in _PACK:
        return Use("alu", PACK)
    if name in _FP64:
        return Use("fp64", FP64)
    if name in _XU:
        return Use("xu", XU)
    if name.startswith("U") or name == "R2UR":
        return Use("uniform", UNIFORM)
    return Use("alu", ALU)


def latency_of(instruction: Instruction) -> int:
    return LATENCY.get(instruction.name, OTHER_LATENCY)
