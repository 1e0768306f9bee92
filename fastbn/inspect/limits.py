"""fastbn.set_max_sms: caps the SMs that a kernel may hold until it is done, so that other work can run beside it."""

from __future__ import annotations

from fastbn import _C


def set_max_sms(count: int | None) -> None:
    """Let stream plans occupy at most `count` SMs of a GPU; None allows all (default).

    The one kernel of a stream plan holds its SMs until it is done; on fewer SMs, communication (NCCL) can overlap with
    it. The kernels of other plans make room as their blocks end. The cap holds for the process from the next call on,
    and `explain` plans by it too. Results may differ in their last bits, because sums are split differently.

    Raises ValueError for a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1, or None, got {count}")
    _C.set_max_sms(count)
