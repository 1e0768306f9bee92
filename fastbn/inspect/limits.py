"""fastbn.set_max_sms: leaves multiprocessors of a GPU to what runs beside."""

from __future__ import annotations

from fastbn import _C


def set_max_sms(count: int | None) -> None:
    """Let cooperative plans take at most `count` multiprocessors of a GPU, or all with None, which is how it begins.

    A cooperative plan holds the multiprocessors that it has until it is done; with fewer of them, communication (NCCL)
    can run at the same time. Holds for the process, from the next call on; `explain` plans by it too. Results may
    differ in their last bits, because sums are split otherwise.

    Raises ValueError for a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1, or None, got {count}")
    _C.set_max_sms(count)
