"""A unit of timing: one op on one case in one dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastbn.measure.operations import Operation
from fastbn.testing.cases import Case


@dataclass(frozen=True)
class Workload:
    """A unit of timing: an operation on a case in a dtype, by all implementations in turns."""

    group: str
    case: Case
    dtype: torch.dtype
    operation: Operation
    compiled: bool = False  # torch.compile is a rival too; it takes seconds to compile

    def __str__(self) -> str:
        return f"{self.case} {dtype_name(self.dtype)} {self.operation}"

    @property
    def tensor_bytes(self) -> int:
        return self.case.numel * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
