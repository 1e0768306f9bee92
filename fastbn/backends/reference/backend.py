"""The float64 reference as a backend, which serves whoever names it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastbn._C import DeviceLimits
from fastbn.backends import reference
from fastbn.ops.dispatch import Call, Plan


class ReferenceBackend:
    """Every op in plain torch operations in float64, on any device: for comparison, not for speed."""

    name = "reference"
    ops: Any = reference
    device_types: tuple[str, ...] = ()

    def why_not(self, call: Call) -> str | None:
        return None

    def saves_mask(self, input: Tensor) -> bool:
        return True

    def plan(self, call: Call, direction: str, reason: str, limits: DeviceLimits | None = None) -> Plan:
        return Plan(self.name, "float64", 0, math.nan, math.nan, 0, 0, 0, reason)

    def availability(self) -> str:
        return "yes: float64, for comparison"


REFERENCE = ReferenceBackend()
