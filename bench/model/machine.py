"""The GPU of the measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    sms: int
    shared_bytes: int  # per block, at most
    reserved_shared_bytes: int  # per block, beside what it asks for
    l2_bytes: int
    registers: int  # per SM


# As plan/device.h has it.
H200 = Machine(132, 232448, 1024, 60 << 20, 1 << 16)
