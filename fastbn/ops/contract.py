"""The eight ops as Python sees them: loads fastbn._C and adds what torch needs beside kernels.

That is the shapes that tracing asks for, and the refusal to differentiate an op directly.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastbn import _torch
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.layout import mask_shape, suggest_memory_format

try:
    from fastbn import _C
except ImportError as error:
    raise ImportError(
        f"fastbn._C could not be loaded ({error}): build it with 'pip install .' in a clone of fastbn, against PyTorch "
        "2.10 or newer"
    ) from error

BUILD_INFO: dict[str, Any] = _C.build_info()
HALF_TYPES = (torch.bfloat16, torch.float16)

# In the order of DType in csrc/math/types.h.
DTYPES = (torch.float32, torch.float64, *HALF_TYPES)

OPS = (
    "batch_norm_train",
    "batch_norm_eval",
    "batch_norm_frozen",
    "batch_norm_backward",
    "channel_stats",
    "normalize",
    "grad_sums",
    "input_grad",
)


def _stats(input: Tensor) -> Tensor:
    return input.new_empty(input.size(1), dtype=torch.float64)


def _output(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _mask(input: Tensor, activation: int, wanted: bool) -> Tensor:
    if not (wanted and is_piecewise_linear(activation)):
        return input.new_empty(0, dtype=torch.uint8)
    shape = mask_shape(tuple(input.shape), suggest_memory_format(input))
    return input.new_empty(shape, dtype=torch.uint8)


def _check_devices(input: Tensor, *tensors: Tensor | None) -> None:
    """One meta tensor is enough for torch to call what is here instead of the kernels, which check this too."""
    for tensor in tensors:
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"batch_norm: expected all tensors on {input.device}, got one on {tensor.device}")


def _fake_train(
    input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, activation, save_mask
):
    _check_devices(input, weight, bias, running_mean, running_var, num_batches_tracked)
    return _output(input), _stats(input), _stats(input), _mask(input, activation, save_mask)


def _fake_eval(input, residual, weight, bias, running_mean, running_var, eps, activation):
    _check_devices(input, weight, bias, running_mean, running_var)
    return _output(input)


def _fake_frozen(input, residual, weight, bias, running_mean, running_var, eps, activation, save_mask):
    _check_devices(input, weight, bias, running_mean, running_var)
    return _output(input), _stats(input), _stats(input), _mask(input, activation, save_mask)


def _fake_backward(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    batch_stats,
    activation,
    need_input,
    need_weight,
    need_bias,
    need_residual,
):
    vector = next((v for v in (weight, bias) if v is not None), input)
    return (
        _output(input) if need_input else input.new_empty(0),
        vector.new_empty(input.size(1) if need_weight else 0),
        vector.new_empty(input.size(1) if need_bias else 0),
        _output(input) if need_residual else input.new_empty(0),
    )


def _fake_channel_stats(input):
    return _stats(input), _stats(input)


def _fake_normalize(input, residual, weight, bias, mean, inv_std, activation, save_mask):
    return _output(input), _mask(input, activation, save_mask)


def _fake_grad_sums(grad_out, input, residual, mask, weight, bias, mean, inv_std, activation):
    return _stats(input), _stats(input)


def _fake_input_grad(
    grad_out,
    input,
    residual,
    mask,
    weight,
    bias,
    mean,
    inv_std,
    sum_grad,
    sum_grad_xhat,
    count,
    activation,
    need_residual,
):
    return _output(input), _output(input) if need_residual else input.new_empty(0)


_FAKES = (
    _fake_train,
    _fake_eval,
    _fake_frozen,
    _fake_backward,
    _fake_channel_stats,
    _fake_normalize,
    _fake_grad_sums,
    _fake_input_grad,
)


def _refuse_backward(op: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"{op} cannot be differentiated directly: use fastbn.functional.batch_norm")

    return backward


def _refuse_forward(op):
    """torch registers backward formulas for functional ops only; the op with buffers refuses when it is called."""

    def forward(keyset, *args):
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            _refuse_backward(op.name())(None)
        return op.redispatch(keyset & _torch.after_autograd, *args)

    return forward


_libraries = []  # registrations last as long as these


def bind(ops: str) -> SimpleNamespace:
    """The eight ops of the torch.ops namespace `ops`, made known to torch's tracers."""
    library = torch.library.Library(ops, "IMPL")
    _libraries.append(library)
    packets = getattr(torch.ops, ops)
    for name, fake in zip(OPS, _FAKES, strict=True):
        qualified = f"{ops}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        op = getattr(packets, name).default
        if op._schema.is_mutable:
            library.impl(name, _refuse_forward(op), "Autograd", with_keyset=True)
        else:
            torch.library.register_autograd(qualified, _refuse_backward(qualified), lib=library)
    return SimpleNamespace(**{name: getattr(packets, name).default for name in OPS})
