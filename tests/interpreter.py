"""Triton's interpreter for the tests, with repairs without which its results, or its time, would be of no use."""

from __future__ import annotations

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the bits of bfloat16, to nearest even as every GPU does; the interpreter truncates."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).astype(np.uint16)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _sum(reduction: interpreter.ReduceOps, tensor: tl.tensor) -> tl.tensor:
    """Add up in a tree, as GPUs do; numpy adds one by one along all axes but the last."""
    x, axis = tensor.handle.data, reduction.axis
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    with np.errstate(all="ignore"):
        while x.shape[axis] > 1:
            x = np.add(*np.split(x, 2, axis=axis))
    x = x if reduction.keep_dims else x.squeeze(axis)
    return reduction.to_tensor(x if x.shape else x.item(), tensor.dtype)


def _reduce(reduction: interpreter.ReduceOps, tensors: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Combine whole arrays in a tree; the interpreter combines one element at a time, in Python."""
    axis = reduction.axis
    with np.errstate(all="ignore"):
        while tensors[0].handle.data.shape[axis] > 1:
            halves = zip(*(np.split(tensor.handle.data, 2, axis=axis) for tensor in tensors), strict=True)
            dtypes = [tensor.dtype for tensor in tensors]
            operands = [reduction.to_tensor(x, dtype) for half in halves for x, dtype in zip(half, dtypes, strict=True)]
            tensors = reduction.combine_fn.fn(*operands)
    results = [(tensor.handle.data, tensor.dtype) for tensor in tensors]
    return [reduction.to_tensor(x if reduction.keep_dims else x.squeeze(axis), dtype) for x, dtype in results]


def repair() -> None:
    """Patch the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast_impl(self, source, type):
        kinds = source.dtype.scalar, type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_from_bfloat16(source.data), tl.float32)
        return original(self, source, type)

    builder.cast_impl = cast_impl
    interpreter.ReduceOps.sum = _sum
    interpreter.ReduceOps.generic_reduce = _reduce
    # The interpreter patches triton.language in each call of a function, which takes half of all time. Once is enough
    # if nothing is put back: no kernel is compiled in a process of the interpreter.
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
