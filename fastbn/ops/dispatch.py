"""The types Call, Plan and Backend, and the calls for which torch's own batch_norm has to run, whatever the backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function_variadic

from fastbn import _torch
from fastbn._C import DeviceLimits
from fastbn.ops.contract import DTYPES, HALF_TYPES


class Call(NamedTuple):
    """The operands of one call in the order of the ops' schemas, and whether it normalises by batch statistics.

    `num_batches_tracked` is None in evaluation; `activation` is an index (fastbn.ops.activations), and
    `activation_param` None for torch's default.
    """

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    activation: int
    training: bool
    activation_param: float | None = None


@dataclass(frozen=True)
class Plan:
    """The way one call runs. Traffic is predicted, not measured, in units of S, the bytes of one activation tensor; NaN
    where it was not counted. fused: "", or what follows the normalisation, such as "addition and relu"."""

    backend: str
    kernel: str
    launches: int
    tensor_reads: float
    tensor_writes: float
    blocks: int
    threads: int
    shared_bytes: int
    reason: str
    fused: str = ""

    def __str__(self) -> str:
        parts = [f"{self.backend}: {self.kernel}" + f" with {self.fused}" * bool(self.fused)]
        if self.launches:
            parts.append(f"{self.launches} launch{'es' if self.launches > 1 else ''}")
        if self.threads:
            parts.append(f"{self.blocks} blocks of " * (self.blocks > 0) + f"{self.threads} threads")
        traffic = [f"reads {self.tensor_reads:g} S, writes {self.tensor_writes:g} S"]
        if math.isnan(self.tensor_reads):
            traffic = []
        return "; ".join([", ".join(parts), *traffic, self.reason])


class Backend(Protocol):
    """An implementation of the ops, or torch's own operations; fastbn.backends.registry knows all of them."""

    @property
    def name(self) -> str: ...

    @property
    def ops(self) -> Any:
        """Return the eight ops as attributes, or None for a composition of torch's operations that needs none."""

    @property
    def device_types(self) -> tuple[str, ...]:
        """Return the types of devices whose tensors the backend is offered without being named."""

    def why_not(self, call: Call) -> str | None:
        """Return why the backend cannot take a call that the contract allows, or None if it can."""

    def saves_mask(self, input: Tensor) -> bool:
        """Return whether the backward of a piecewise linear activation after a residual reads a mask."""

    def plan(self, call: Call, direction: str, reason: str, limits: DeviceLimits | None = None) -> Plan:
        """Return how the backend runs a call. direction: "forward" or "backward". reason: the start of the plan's.

        limits: those of a GPU that need not be here, for backends of GPUs; None for the device of the input.
        """

    def availability(self) -> str:
        """Return "yes: ..." or "no: ..." with what runs, or what is missing, in this process."""


_NUMBERS = (float, int)


def why_torch_must_see(call: Call) -> str | None:
    """Return why torch's own batch_norm has to run, whatever the kernels could do: something looks through it, or
    refuses it. None if nothing does."""
    if _torch.is_in_functorch_transform():
        return "functorch transforms differentiate and batch torch's own batch_norm"
    if _torch.is_in_forward_ad():
        return "forward-mode AD has its formula for torch's own batch_norm"
    tensors = call[:6]
    if has_torch_function_variadic(*tensors) and _is_overridden(*tensors):
        return "a __torch_function__ override knows torch.nn.functional.batch_norm"
    input = call.input
    if type(input) is not Tensor and _torch.is_traceable_wrapper_subclass(input):
        return f"{type(input).__name__} knows aten::batch_norm, not fastbn's ops"
    if _torch.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "what consumes an exported graph knows aten::batch_norm, not fastbn's ops"
    return None


def is_in_inference_mode() -> bool:
    """Return whether inference mode keeps an eager call from being recorded; a compiler cannot ask for it."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def is_recorded(call: Call) -> bool:
    """Return whether autograd records the call: never in inference mode, even where gradients are enabled inside it."""
    input, residual, weight, bias, *_ = call
    return (
        torch.is_grad_enabled()
        and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
        and not is_in_inference_mode()
    )


def cannot_be_saved(*tensors: Tensor | None) -> bool:
    """Return whether one is an inference tensor, which torch's batch_norm refuses to save before it moves buffers."""
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():
            return True
    return False


def _is_overridden(*tensors: Tensor | None) -> bool:
    """Return whether a subclass or a mode may implement batch_norm; torch.set_default_device, a mode, does not."""
    plain = Tensor.__torch_function__, Parameter.__torch_function__
    if any(type(t).__torch_function__ not in plain for t in tensors if t is not None):
        return True
    return any(type(mode) is not _torch.DeviceContext for mode in _torch.function_mode_stack())


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Raise ValueError if a residual has not the shape, dtype and device of the input."""
    if residual.shape != input.shape:
        raise ValueError(f"batch_norm: expected residual of shape {list(input.shape)}, got {list(residual.shape)}")
    if residual.dtype != input.dtype:
        raise ValueError(f"batch_norm: expected residual of dtype {input.dtype}, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"batch_norm: expected residual on {input.device}, got {residual.device}")


def why_unsupported(call: Call, *, takes_one_value: bool = False) -> str | None:
    """Return why no op can take a call that torch may still take, or will refuse in its own words; None if they can.

    takes_one_value: whether one value per channel is enough for the caller, as it is for the ops.
    """
    return why_refused(call) or why_left_to_torch(call, takes_one_value=takes_one_value)


def why_left_to_torch(call: Call, *, takes_one_value: bool = False) -> str | None:
    """Return the part of `why_unsupported` that the ops do not refuse themselves."""
    input, _, _, _, running_mean, running_var, counter, momentum, eps, _, training, _ = call
    if counter is not None and not torch.compiler.is_compiling() and counter.is_inference():
        if not torch.is_inference_mode_enabled():
            return "num_batches_tracked is an inference tensor, which torch refuses to update"
    if (
        type(training) is not bool
        or not isinstance(eps, _NUMBERS)
        or not (momentum is None or isinstance(momentum, _NUMBERS))
    ):
        return "training is not a bool, or momentum or eps no Python number"
    if not eps > 0:
        return "eps is not positive"
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            return "only one running statistic is given"
        if not training:
            return "evaluation needs running statistics"
    elif running_mean.requires_grad or running_var.requires_grad:
        return "running statistics require a gradient"
    elif training and not torch.compiler.is_compiling() and (running_mean.is_neg() or running_var.is_neg()):
        # The dispatcher would hand the op a copy to update.
        return "running statistics are negative views"
    if training and not takes_one_value and input.dim() > 1 and input.numel() == input.shape[1]:
        return "there is but one value a channel"
    return None


def why_refused(call: Call) -> str | None:
    """Return the part of `why_unsupported` that the ops refuse with RuntimeError, before anything has changed."""
    input, _, weight, bias, running_mean, running_var, counter, *_ = call
    dtype, shape, device = input.dtype, input.shape, input.device
    if dtype not in DTYPES:
        return f"fastbn has no kernels for {dtype}"
    if input.layout is not torch.strided:
        return f"fastbn takes strided tensors, not {input.layout}"
    if len(shape) < 2:
        return "fastbn takes inputs of at least two dimensions"
    channels = shape[1]
    if channels == 0:
        return "there are no channels"
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1 or counter.device != device):
        return "num_batches_tracked is not one int64 on the input's device"
    vector_shape, vector_dtype = (channels,), None
    for vector in (weight, bias, running_mean, running_var):
        if vector is None:
            continue
        if vector.shape != vector_shape or not vector.is_contiguous():
            return f"a parameter or running statistic is not a contiguous vector of {channels}"
        if vector.device != device:
            return "parameters and input are on different devices"
        if vector_dtype is None:
            vector_dtype = vector.dtype
            if vector_dtype != dtype and not (vector_dtype == torch.float32 and dtype in HALF_TYPES):
                return f"parameters of {vector_dtype} do not go with an input of {dtype}"
        elif vector.dtype != vector_dtype:
            return "parameters and running statistics differ in dtype"
    return None
