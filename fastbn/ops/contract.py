"""The eight ops as Python sees them: loads fastbn._C and adds what torch needs beside kernels.

That is a fake of each op, made from its schema in csrc/bindings/schemas.cpp, and the refusal to differentiate an op.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastbn import _C, _torch
from fastbn.ops import activations
from fastbn.ops.activations import is_piecewise_linear
from fastbn.ops.layout import mask_shape, suggest_memory_format

activations.check_build(_C.activations())
BUILD_INFO: dict[str, Any] = _C.build_info()
HALF_TYPES = (torch.bfloat16, torch.float16)

DTYPES = (torch.float32, torch.float64, *HALF_TYPES)  # in the order of DType in csrc/math/types.h
if [f"torch.{name}" for name in BUILD_INFO["dtypes"]] != [str(dtype) for dtype in DTYPES]:
    raise ImportError(f"fastbn._C: expected the dtypes {DTYPES}, got {BUILD_INFO['dtypes']}; build it again")

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


def _activation(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.input, memory_format=suggest_memory_format(call.input))


def _stats(call: SimpleNamespace) -> Tensor:
    return call.input.new_empty(call.input.size(1), dtype=torch.float64)


def _mask(call: SimpleNamespace) -> Tensor:
    shape: tuple[int, ...] = (0,)
    if call.save_mask and is_piecewise_linear(call.activation):
        shape = mask_shape(tuple(call.input.shape), suggest_memory_format(call.input))
    return call.input.new_empty(shape, dtype=torch.uint8)


def _parameter_gradient(call: SimpleNamespace, is_needed: bool) -> Tensor:
    like = next((vector for vector in (call.weight, call.bias) if vector is not None), call.input)
    return like.new_empty(call.input.size(1) if is_needed else 0)


# Functions that allocate a result, by its name in the schemas, from the arguments by theirs. A name means the same in
# every op. An op without `need_input` always returns grad_input.
_RESULTS: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    "output": _activation,
    "mean": _stats,
    "var": _stats,
    "inv_std": _stats,
    "mask": _mask,
    "sum_grad": _stats,
    "sum_grad_xhat": _stats,
    "grad_input": lambda call: _activation(call) if getattr(call, "need_input", True) else call.input.new_empty(0),
    "grad_residual": lambda call: _activation(call) if call.need_residual else call.input.new_empty(0),
    "grad_weight": lambda call: _parameter_gradient(call, call.need_weight),
    "grad_bias": lambda call: _parameter_gradient(call, call.need_bias),
}


def _fake_of(op: Any) -> Callable[..., Any]:
    """Return the fake of an op: it binds arguments by their names in the schema and allocates results by theirs."""
    arguments = op._schema.arguments
    results = [_RESULTS[result.name] for result in op._schema.returns]

    def fake(*values: Any) -> Any:
        # torch leaves out trailing arguments that have their default value.
        values += tuple(argument.default_value for argument in arguments[len(values) :])
        call = SimpleNamespace(**{argument.name: v for argument, v in zip(arguments, values, strict=True)})
        for tensor in values:
            # One meta tensor is enough for torch to call this instead of the kernels, which check the devices too.
            if isinstance(tensor, Tensor) and tensor.device != call.input.device:
                raise RuntimeError(
                    f"batch_norm: expected all tensors on {call.input.device}, got one on {tensor.device}"
                )
        outputs = tuple(result(call) for result in results)
        return outputs if len(outputs) > 1 else outputs[0]

    return fake


def _refuse_backward(op: str) -> Callable[..., None]:
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{op} cannot be differentiated directly: use fastbn.functional.batch_norm")

    return backward


def _refuse_forward(op: Any) -> Callable[..., Any]:
    """Return an autograd kernel that refuses to be differentiated: torch registers formulas for functional ops only."""

    def forward(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            _refuse_backward(op.name())(None)
        return op.redispatch(keyset & _torch.after_autograd, *args)

    return forward


libraries: list[torch.library.Library] = []  # registrations last as long as these


def bind(ops: str) -> SimpleNamespace:
    """Return the eight ops of the torch.ops namespace `ops`, and make them known to torch's tracers."""
    library = torch.library.Library(ops, "IMPL")
    libraries.append(library)
    packets = getattr(torch.ops, ops)
    for name in OPS:
        qualified = f"{ops}::{name}"
        op = getattr(packets, name).default
        torch.library.register_fake(qualified, _fake_of(op), lib=library)
        if op._schema.is_mutable:
            library.impl(name, _refuse_forward(op), "Autograd", with_keyset=True)
        else:
            torch.library.register_autograd(qualified, _refuse_backward(qualified), lib=library)
    return SimpleNamespace(**{name: getattr(packets, name).default for name in OPS})
