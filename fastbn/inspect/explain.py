"""fastbn.explain: which implementation a call would run, what it would launch and move, and why not a faster one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from fastbn import _C
from fastbn._torch import fake_tensors
from fastbn.backends import aten, native, registry
from fastbn.backends.registry import Name as BackendName
from fastbn.inspect import model
from fastbn.nn.torch_activations import ActivationLike, read_activation
from fastbn.ops import dispatch
from fastbn.ops.activations import check_param, describe_fused
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Backend, Call, Plan

Direction: TypeAlias = Literal["forward", "backward"]
# GPUs whose limits are known, so that they need not be here.
GpuName: TypeAlias = Literal["a100", "h100", "h200", "b200"]
_DIRECTIONS = ("forward", "backward")
_GPUS = ("a100", "h100", "h200", "b200")


@overload
def explain(
    input: Tensor | Sequence[int],
    shape_or_direction: Direction | str | None = None,
    *,
    direction: Direction | str | None = None,
    activation: ActivationLike = None,
    activation_param: float | None = None,
    residual: bool = False,
    training: bool | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: GpuName | str | torch.device | None = None,
    backend: BackendName | str | None = None,
) -> Plan: ...


@overload
def explain(
    input: nn.Module,
    shape_or_direction: Sequence[Any] | None = None,
    *,
    input_shape: Sequence[Any] | None = None,
    direction: Direction | str | None = None,
    residual: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: GpuName | str | None = None,
    backend: BackendName | str | None = None,
) -> Plan | dict[str, Plan]: ...


def explain(
    input: Tensor | Sequence[int] | nn.Module,
    shape_or_direction: Any = None,
    *,
    input_shape: Sequence[Any] | None = None,
    direction: str | None = None,
    activation: ActivationLike = None,
    activation_param: float | None = None,
    residual: bool = False,
    training: bool | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> Plan | dict[str, Plan]:
    """Return the plan for batch-normalising an input, or the plans of all BatchNorm layers of a model.

        explain(x)                                     # a tensor, (N, C, *), on any device; a meta tensor is enough
        explain((64, 256, 56, 56), dtype=torch.bfloat16, device="h200")           # a shape; no memory is allocated
        explain(layer, (64, 256, 56, 56))              # a layer, with its activation and in its mode
        explain(model, (64, 3, 224, 224))              # a model: {name of a layer: Plan} in the order of their calls

    The second argument is the direction, "forward" (default) or "backward", of a tensor or a shape, and the shape of
    the input of a layer or a model, or of each of several of a model, whose direction is given by keyword. activation,
    activation_param: as fastbn's layers take them; the plan does not depend on the latter. training:
    batch statistics (default), else frozen ones. residual: whether one is added; of modules only for a layer. A module
    has its own activation and mode, and what `fastbn.convert` fused shows in the plans' `fused`.
    dtype, memory_format: of a shape, by default torch's default dtype and torch.contiguous_format; of a module's input
    the dtype of its first parameter.
    device: "a100", "h100", "h200" or "b200" plans for that GPU, which need not be here. None: for the input's device,
    the module's, or for a shape torch's default device; a shape may also be given "cpu", "cuda" or a torch.device.
    backend: a name as fastbn.functional.batch_norm takes it; None for the backend that an eager call would get, which
    autograd records in training ("cuda" for a GPU by name).

    A model runs once as a copy whose tensors have shapes and no values, so it stays as it is, and what it keeps in
    Python too; its hooks run. Layers that the run does not reach are left out, and a layer's second call is `name#2`.
    torch's own layers are in the dict, and a variant such as GhostBatchNorm2d has a plan whose traffic is NaN.

    Raises ValueError for an argument outside these, for a backend that cannot take the call, and for a model that
    cannot run on such an input without values, or is compiled or scripted; TypeError for what is no tensor, shape or
    module.
    """
    if isinstance(input, nn.Module):
        shape = shape_or_direction if input_shape is None else input_shape
        if input_shape is not None and shape_or_direction is not None:
            raise ValueError(f"explain: expected one input_shape, got {shape_or_direction!r} and {input_shape!r}")
        for name, given in (("activation", activation), ("activation_param", activation_param), ("training", training)):
            if given is not None:
                raise ValueError(f"{name}: expected none beside a module, which has its own, got {given!r}")
        if device is not None and device not in _GPUS:
            raise ValueError(f"device: expected one of {', '.join(_GPUS)}, or None for the module's, got {device!r}")
        toward = _check_direction(direction)

        def plan(seen: model.Seen, by: str | None) -> Plan:
            return _explain(
                seen.input,
                toward,
                activation=seen.activation,
                activation_param=seen.activation_param,
                residual=seen.residual or (seen.is_whole_model and residual),
                training=seen.training,
                gpu=None if by else device,
                backend=by or backend,
            )

        if residual and not model.is_layer(input):
            raise ValueError(f"residual: expected False for a model, whose forward adds its own, got {residual!r}")
        shapes = _check_shapes(shape)
        if len(shapes) > 1 and model.is_layer(input):
            raise ValueError(f"input_shape: expected one for a layer, perhaps with residual=True, got {shapes}")
        return model.explain_module(input, shapes, dtype, memory_format, plan)
    if input_shape is not None:
        raise ValueError(f"input_shape: expected none beside a {type(input).__name__}, got {input_shape!r}")
    if direction is not None and shape_or_direction is not None:
        raise ValueError(f"explain: expected one direction, got {shape_or_direction!r} and {direction!r}")
    toward = _check_direction(shape_or_direction if direction is None else direction)
    fused, activation_param = read_activation(activation, activation_param)
    if not isinstance(input, Tensor):
        input, device = _without_values(input, dtype, memory_format, device)
    elif dtype is not None or memory_format is not None:
        raise ValueError("explain: expected dtype and memory_format for a shape alone: a tensor has its own")
    return _explain(
        input,
        toward,
        activation=fused,
        activation_param=activation_param,
        residual=residual,
        training=training is None or training,
        gpu=device,
        backend=backend,
    )


def _explain(
    input: Tensor,
    direction: str,
    *,
    activation: str | None,
    activation_param: float | None,
    residual: bool,
    training: bool,
    gpu: str | torch.device | None,
    backend: str | None,
) -> Plan:
    recorded = training or direction == "backward"  # as in a network, whatever the input
    if recorded and input.is_floating_point() and not input.is_inference():
        input = input.detach().requires_grad_()
    limits = None if gpu is None else _C.named_device(str(gpu))
    index = activation_index(activation)
    call = Call(
        input,
        input if residual else None,
        None,
        None,
        *_statistics(input, training),
        None,
        0.1,
        1e-5,
        index,
        training,
        check_param(index, activation_param),
    )
    if limits is None:
        chosen, reason = registry.choose(call, backend, ask_all=True)
        plan = chosen.plan(call, direction, reason or f"no backend is faster for {input.device.type} tensors")
    else:
        reason = dispatch.why_torch_must_see(call) or dispatch.why_unsupported(call)
        if reason is None:
            plan = _planner(backend).plan(call, direction, f"planned for {gpu}", limits)
        else:
            plan = aten.TORCH.plan(call, direction, reason)
    return dataclasses.replace(plan, fused=describe_fused(index, residual))


def _planner(name: str | None) -> Backend:
    """Return the backend that plans for a GPU which need not be here."""
    backend = native.CUDA if name is None else registry.get(name)
    if "cuda" not in backend.device_types:
        raise ValueError(f"backend: expected one that plans for a device, got {name!r}")
    return backend


def _statistics(input: Tensor, training: bool) -> tuple[Tensor | None, Tensor | None]:
    if training:
        return None, None
    channels = input.size(1) if input.dim() > 1 else 0
    stats = input.new_empty(channels)
    return stats, stats


def _check_direction(direction: object) -> str:
    if direction is None:
        return "forward"
    if not isinstance(direction, str) or direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(_DIRECTIONS)}, got {direction!r}")
    return direction


def _check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of int. Raises TypeError for what is none, and ValueError for a negative size."""
    expected = f"{name}: expected a shape, such as (64, 256, 56, 56)"
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{expected}, got {shape!r}")
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in shape):
        raise TypeError(f"{expected}, got {shape!r}")
    if any(size < 0 for size in shape):
        raise ValueError(f"{expected}, got {tuple(shape)}")
    return tuple(shape)


def _check_shapes(shapes: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the inputs of a model, one or several."""
    if isinstance(shapes, Sequence) and shapes and all(isinstance(each, (tuple, list)) for each in shapes):
        return [_check_shape("input_shape", shape) for shape in shapes]
    return [_check_shape("input_shape", shapes)]


def _without_values(
    shape: Any, dtype: torch.dtype | None, memory_format: torch.memory_format | None, device: Any
) -> tuple[Tensor, str | None]:
    """Return (a tensor of that shape without memory, the name of the GPU to plan for or None)."""
    sizes = _check_shape("explain", shape)
    layout = memory_format or torch.contiguous_format
    if isinstance(device, str) and device in _GPUS:
        return model.make_empty(sizes, dtype=dtype, device="meta", memory_format=layout), device
    expected = f"device: expected one of {', '.join(_GPUS)}, or a device of torch that is here"
    try:
        where = torch.device(device) if device is not None else torch.get_default_device()
    except RuntimeError:
        raise ValueError(f"{expected}, got {device!r}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{expected}, got {device or where!s}: torch sees no GPU")
    with fake_tensors():
        return model.make_empty(sizes, dtype=dtype, device=where, memory_format=layout), None
