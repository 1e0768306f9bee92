"""The ops as Python sees them: loads fastbn._C, adds what torch needs beside kernels, and decides who serves a call.

Kernels come from C++; here are the shapes that tracing asks for, the refusal to differentiate an op directly, and what
a backend can take.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack, has_torch_function_variadic
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastbn import _formulas, reference
from fastbn._activations import is_piecewise_linear

try:
    from fastbn import _C
except ImportError as error:
    raise ImportError(
        f"fastbn._C could not be loaded ({error}): build it with 'pip install .' in a clone of fastbn, against PyTorch "
        "2.10 or newer"
    ) from error

CUDA_ARCHITECTURES: str = _C.build_info()["cuda_architectures"]
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

_backends: dict[str, Any] = {}


def namespace(backend: str) -> Any:
    """What holds the eight ops of a backend as attributes. ValueError for an unknown name."""
    try:
        return _backends[backend]
    except KeyError:
        raise ValueError(f"backend: expected one of {', '.join(_backends)}, torch, got {backend!r}") from None


def backends() -> tuple[str, ...]:
    """The names that `namespace` knows."""
    return tuple(_backends)


def default_backend(device: torch.device) -> tuple[str | None, str]:
    """(the backend that serves tensors of a device, or None, and why)."""
    if device.type == "cpu":
        return "cpu", "CPU tensors run on the C++ kernels"
    if device.type == "cuda":
        if not CUDA_ARCHITECTURES:
            return None, "fastbn was built without CUDA (no nvcc, or FASTBN_CUDA=0)"
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(capability, CUDA_ARCHITECTURES):
            return None, f"fastbn was built for {CUDA_ARCHITECTURES}, and this GPU is {capability[0]}.{capability[1]}"
        return "cuda", "CUDA tensors run on the CUDA kernels"
    return None, f"fastbn has no kernels for {device.type} tensors"


def backend_of(input: Tensor) -> str | None:
    """What `default_backend` says of its device, in less time."""
    return "cpu" if input.is_cpu else default_backend(input.device)[0]


@functools.cache
def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether binaries for `architectures`, in the form of TORCH_CUDA_ARCH_LIST, run on a GPU of that capability.

    Code of the same major and no later minor version does, and so does PTX of any earlier version. Unknown forms may.
    """
    for architecture in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", architecture)
        if match is None:
            return True
        built = int(match[1]), int(match[2])
        if built <= capability and (built[0] == capability[0] or match[3]):
            return True
    return False


def why_torch_must_see(input: Tensor, *tensors: Tensor | None) -> str | None:
    """Why torch's own batch_norm has to run, whatever the kernels could do: something looks through it, or refuses it.

    tensors: the other operands.
    """
    # Not `is not None`: Dynamo wraps what it cannot trace, and a wrapped None is not None.
    if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
        return "functorch transforms differentiate and batch torch's own batch_norm"
    if forward_ad._current_level >= 0:
        return "forward-mode AD has its formula for torch's own batch_norm"
    if has_torch_function_variadic(input, *tensors) and _is_overridden(input, *tensors):
        return "a __torch_function__ override knows torch.nn.functional.batch_norm"
    if type(input) is not Tensor and is_traceable_wrapper_subclass(input):
        return f"{type(input).__name__} knows aten::batch_norm, not fastbn's ops"
    # Not is_exporting(), which Dynamo of torch 2.10 takes for true wherever it compiles.
    if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
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
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def saves_mask(backend: str, input: Tensor) -> bool:
    """Whether backward finds the derivative of a piecewise linear activation after a residual in the mask.

    CUDA kernels walk whole octets, across runs where a run is not whole ones; the mask begins a byte with each run. It
    is the residual then that backward reads.
    """
    if backend in ("cpu", "reference") or input.dim() < 2:
        return True
    return _formulas.runs_of(tuple(input.shape), _formulas.suggest_memory_format(input))[2] % 8 == 0


def why_unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors of a device; None if it can. ValueError for an unknown name."""
    namespace(backend)
    served, reason = default_backend(device)
    return reason if backend in ("cpu", "cuda") and served != backend else None


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


def _stats(input: Tensor) -> Tensor:
    return input.new_empty(input.size(1), dtype=torch.float64)


def _output(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=_formulas.suggest_memory_format(input))


def _mask(input: Tensor, activation: int, wanted: bool) -> Tensor:
    if not (wanted and is_piecewise_linear(activation)):
        return input.new_empty(0, dtype=torch.uint8)
    shape = _formulas.mask_shape(tuple(input.shape), _formulas.suggest_memory_format(input))
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


def _refuse_forward(op: torch._ops.OpOverload):
    """torch registers backward formulas for functional ops only; the op with buffers refuses when it is called."""

    def forward(keyset, *args):
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            _refuse_backward(op.name())(None)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return forward


_libraries = []  # registrations last as long as these


def register(backend: str, ops: str) -> None:
    """Make the C++ ops of the torch.ops namespace `ops` known to torch's tracers, and a backend of that name."""
    library = torch.library.Library(ops, "IMPL")
    _libraries.append(library)
    for name, fake in zip(OPS, _FAKES):
        qualified = f"{ops}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        op = getattr(getattr(torch.ops, ops), name).default
        if op._schema.is_mutable:
            library.impl(name, _refuse_forward(op), "Autograd", with_keyset=True)
        else:
            torch.library.register_autograd(qualified, _refuse_backward(qualified), lib=library)
    packets = getattr(torch.ops, ops)
    _backends[backend] = SimpleNamespace(**{name: getattr(packets, name).default for name in OPS})


register("cpu", "fastbn")
_backends["cuda"] = _backends["cpu"]
_backends["reference"] = reference
