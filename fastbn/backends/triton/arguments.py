"""The checks of the ops' arguments, in the words of csrc/bindings/arguments.cpp, and the tensors that kernels get.

All raise RuntimeError before anything has changed.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fastbn.backends.triton.plans import Layout, layout_of
from fastbn.ops.activations import ROWS
from fastbn.ops.contract import DTYPES, HALF_TYPES
from fastbn.ops.layout import mask_shape, suggest_memory_format

_NOT_ALLOCATED = "The tensor has a non-zero number of elements, but its data is not allocated yet."


class Operands:
    """The operands of a call of one op. Elements are dense in the memory format of the input, by a copy if need be."""

    def __init__(self, op: str, input: Tensor) -> None:
        self.op = op
        if input.dtype not in DTYPES:
            self.fail(f"expected input of dtype {', '.join(map(str, DTYPES))}, got {input.dtype}")
        if input.dim() < 2:
            self.fail(f"expected input of at least 2 dimensions, got shape {list(input.shape)}")
        if input.size(1) == 0:
            self.fail(f"expected input of at least one channel, got shape {list(input.shape)}")
        self._first_vector: tuple[str, torch.dtype] | None = None
        self._shape, self._dtype, self._device = tuple(input.shape), input.dtype, input.device
        self.channels = self._shape[1]
        self._set_input(input, suggest_memory_format(input))

    def _set_input(self, input: Tensor, memory_format: torch.memory_format) -> None:
        self.memory_format = memory_format
        self.layout: Layout = layout_of(self._shape, memory_format)
        self.input = self._dense("input", input)

    def fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"{self.op}: {message}")

    def dense(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Return elements of the input's shape and dtype in its memory format."""
        if tensor is None:
            return None
        self._check_device(name, tensor)
        if tensor.shape != self._shape:
            self.fail(f"expected {name} of shape {list(self._shape)}, got {list(tensor.shape)}")
        if tensor.dtype != self._dtype:
            self.fail(f"expected {name} of dtype {self._dtype}, got {tensor.dtype}")
        return self._dense(name, tensor)

    def vector(self, name: str, tensor: Tensor | None, any_strides: bool = False) -> Tensor | None:
        """Return a parameter or running statistic. any_strides: whether it is copied if it is not contiguous."""
        if tensor is None:
            return None
        self._check_device(name, tensor)
        if tensor.shape != (self.channels,):
            self.fail(f"expected {name} of shape [{self.channels}], got {list(tensor.shape)}")
        if tensor.dtype != self._dtype and not (tensor.dtype == torch.float32 and self._dtype in HALF_TYPES):
            also = " or torch.float32" if self._dtype in HALF_TYPES else ""
            self.fail(f"expected {name} of dtype {self._dtype}{also}, got {tensor.dtype}")
        first, dtype = self._first_vector = self._first_vector or (name, tensor.dtype)
        if tensor.dtype != dtype:
            self.fail(f"expected {name} of the dtype of {first}, {dtype}, got {tensor.dtype}")
        if not tensor.is_contiguous() and not any_strides:
            self.fail(f"expected contiguous {name}, got stride {tensor.stride(0)}")
        self._check_storage(name, tensor)
        return tensor.contiguous()

    def float64(
        self, name: str, tensor: Tensor | None, size: int | None = None, any_strides: bool = False
    ) -> Tensor | None:
        """Return float64 numbers, `size` of them, None for one per channel. any_strides: as for `vector`."""
        if tensor is None:
            return None
        size = self.channels if size is None else size
        self._check_device(name, tensor)
        if tensor.dtype != torch.float64 or tensor.numel() != size or not (any_strides or tensor.is_contiguous()):
            self.fail(
                f"expected contiguous {name} of dtype torch.float64 and shape [{size}], got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )
        self._check_storage(name, tensor)
        return tensor.contiguous()

    def counter(self, name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        self._check_device(name, tensor)
        if tensor.dtype != torch.int64 or tensor.numel() != 1:
            self.fail(
                f"expected {name} of dtype torch.int64 and one element, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )
        self._check_storage(name, tensor)
        return tensor

    def mask(self, tensor: Tensor | None) -> Tensor | None:
        """Return the mask. The input takes the memory format that it tells: hooks may have changed strides."""
        if tensor is None:
            return None
        self._check_device("mask", tensor)
        over_channels = tensor.dim() == 2
        if over_channels != (self.layout.inner == 1) and (not over_channels or len(self._shape) >= 4):
            last = torch.channels_last if len(self._shape) == 4 else torch.channels_last_3d
            self._set_input(self.input, last if over_channels else torch.contiguous_format)
        expected = mask_shape(self._shape, self.memory_format)
        if tensor.dtype != torch.uint8 or tensor.shape != expected:
            self.fail(
                f"expected mask of dtype torch.uint8 and shape {list(expected)}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )
        self._check_storage("mask", tensor)
        return tensor.contiguous()

    def activation(self, index: int, param: float | None) -> tuple[str, float]:
        """Return the name of an activation and its parameter, 0 where it has none."""
        if not 0 <= index < len(ROWS):
            self.fail(f"expected activation from 0 to {len(ROWS) - 1}, got {index}")
        row = ROWS[index]
        if param is not None and row.default_param is None:
            self.fail(f"expected no activation_param, which {row.name} has not, got {param}")
        return row.name, float(*row.param(param)) if row.default_param is not None else 0.0

    def empty_elements(self) -> Tensor:
        return torch.empty_like(self.input, memory_format=self.memory_format)

    def empty_mask(self) -> Tensor:
        return self.empty(*mask_shape(self._shape, self.memory_format), dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _dense(self, name: str, tensor: Tensor) -> Tensor:
        self._check_storage(name, tensor)
        return tensor.contiguous(memory_format=self.memory_format)

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self._device:
            self.fail(f"expected {name} on {self._device}, got {tensor.device}")

    def _check_storage(self, name: str, tensor: Tensor) -> None:
        """Fail if a storage was freed or truncated, as FSDP does with parameters: its address would be null."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        expected = (tensor.storage_offset() + extent) * tensor.element_size() if tensor.numel() else 0
        got = tensor.untyped_storage().nbytes()
        if got < expected:
            self.fail(f"expected {name} with a storage of at least {expected} bytes, got {got}. {_NOT_ALLOCATED}")
