"""Whether fastbn's ops can serve a call, and if not, why not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function_variadic

from fastbn import _torch
from fastbn.ops.contract import DTYPES, HALF_TYPES


def why_torch_must_see(input: Tensor, *tensors: Tensor | None) -> str | None:
    """Why torch's own batch_norm has to run, whatever the kernels could do: something looks through it, or refuses it.

    tensors: the other operands.
    """
    if _torch.is_in_functorch_transform():
        return "functorch transforms differentiate and batch torch's own batch_norm"
    if _torch.is_in_forward_ad():
        return "forward-mode AD has its formula for torch's own batch_norm"
    if has_torch_function_variadic(input, *tensors) and _is_overridden(input, *tensors):
        return "a __torch_function__ override knows torch.nn.functional.batch_norm"
    if type(input) is not Tensor and _torch.is_traceable_wrapper_subclass(input):
        return f"{type(input).__name__} knows aten::batch_norm, not fastbn's ops"
    if _torch.is_exporting() or torch.jit.is_tracing():
        return "what consumes an exported graph knows aten::batch_norm, not fastbn's ops"
    return None


def cannot_be_saved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one is an inference tensor, which torch's batch_norm refuses to save before it moves the buffers."""
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():
            return True
    return False


def _is_overridden(*tensors: Tensor | None) -> bool:
    """Whether a subclass or a mode may implement batch_norm. torch.set_default_device is a mode too, and does not."""
    plain = Tensor.__torch_function__, Parameter.__torch_function__
    if any(type(t).__torch_function__ not in plain for t in tensors if t is not None):
        return True
    return any(type(mode) is not _torch.DeviceContext for mode in _torch.function_mode_stack())


def why_unsupported(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> str | None:
    """Why the ops cannot take a call that torch may still take, or will refuse in its own words; None if they can."""
    return why_refused(
        input, running_mean, running_var, weight, bias, num_batches_tracked if training else None
    ) or why_left_to_torch(input, running_mean, running_var, num_batches_tracked, training, momentum, eps)


def why_left_to_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> str | None:
    """The part of `why_unsupported` that the ops do not refuse themselves."""
    if counter is not None and not torch.compiler.is_compiling() and counter.is_inference():
        if not torch.is_inference_mode_enabled():
            return "num_batches_tracked is an inference tensor, which torch refuses to update"
    numbers = float, int
    if (
        type(training) is not bool
        or not isinstance(eps, numbers)
        or not (momentum is None or isinstance(momentum, numbers))
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
    elif not torch.compiler.is_compiling() and (running_mean.is_neg() or running_var.is_neg()):
        # The dispatcher would hand the op a copy to update.
        return "running statistics are negative views"
    if training and input.dim() > 1 and input.numel() == input.shape[1]:
        return "there is but one value a channel"
    return None


def why_refused(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> str | None:
    """The part of `why_unsupported` that the ops refuse with RuntimeError, before anything has changed."""
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
    counter = num_batches_tracked
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
