"""Errors that torch raises below the ops (out of memory above all), preserved with their type and text.

Torch's C interface, through which the ops allocate, drops both. An op whose allocation failed therefore repeats it from
Python, where torch raises its own exception. That exception cannot pass through the op, which fails with a RuntimeError
of the same text, so it is stored here for the caller of the op.
"""

from __future__ import annotations

import threading

import torch

# Keys are c10's names.
_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "BFloat16": torch.bfloat16,
    "Half": torch.float16,
    "Byte": torch.uint8,
}

_last = threading.local()


def allocate(shape: list[int], dtype: str, device: str) -> str:
    """Repeat an allocation that failed in an op. Returns the text of torch's exception, or "" if it now succeeds.

    csrc/bindings/memory.cpp calls it while the op still holds everything that it has allocated.
    """
    try:
        torch.empty(shape, dtype=_DTYPES[dtype], device=device)
    except Exception as error:
        _last.error = error.with_traceback(None)
        return str(error)
    return ""


def raise_of_torch(error: RuntimeError) -> None:
    """Raise torch's own exception if `error`, which an op raised, stands for one; else return."""
    last = vars(_last).pop("error", None)
    if last is not None and str(last) == str(error):
        raise last from None
