"""The BatchNorm layers of a model as one forward calls them: with which inputs, and with what fused.

The forward is that of a copy whose parameters, buffers and inputs are tensors without values. In it a layer of fastbn
tells what it is called with instead of computing it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastbn._torch import BatchNormBase, fake_tensors
from fastbn.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    SyncBatchNorm,
)
from fastbn.nn.epilogue import NOTHING, Epilogue, NormalizationLayer, join, read
from fastbn.nn.whitening import WhiteningBatchNorm1d, WhiteningBatchNorm2d
from fastbn.ops.activations import describe_fused, index
from fastbn.ops.dispatch import Plan
from fastbn.transforms.checkpoint import class_without_checkpoint_safety
from fastbn.transforms.fuse import containers
from fastbn.transforms.fuse.layers import LAYERS

# The layers that are one call of the fused op.
_ONE_CALL = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)
_WHITENING = (WhiteningBatchNorm1d, WhiteningBatchNorm2d)


class Seen(NamedTuple):
    """One call of a layer of class `kind`. `is_one_call`: whether it is one call of the fused op, by its class.
    `is_whole_model`: whether the layer is all that was asked about."""

    layer: nn.Module
    kind: type[nn.Module]
    is_one_call: bool
    input: Tensor
    residual: bool
    activation: str | None
    activation_param: float | None
    training: bool
    is_whole_model: bool = False


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is one layer that normalises, of torch, fastbn, or another library after `convert`."""
    kinds = (BatchNormBase, NormalizationLayer, *_WHITENING)
    return isinstance(module, kinds) or containers.is_layer(module) or type(module) in LAYERS


def make_empty(shape: tuple[int, ...], **options: Any) -> Tensor:
    """Return torch.empty(shape, **options). Raises ValueError where torch has no such tensor."""
    try:
        return torch.empty(shape, **options)
    except (RuntimeError, TypeError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"explain: expected a shape that torch has such tensors of, got {shape}: {said}") from None


def explain_module(
    module: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    plan: Callable[[Seen, str | None], Plan],
) -> Plan | dict[str, Plan]:
    """Return the plan of a layer, or those of a model's layers by name, in the order of their calls.

    plan: makes the plan of one call of the fused op by a backend, None for the one that it would get.
    Raises ValueError where the module cannot run on such an input.
    """
    calls = _calls(module, shapes, dtype, memory_format)
    plans: dict[str, Plan] = {}
    counts: dict[str, int] = {}
    for name, seen in calls:
        counts[name] = counts.get(name, 0) + 1
        key = name if counts[name] == 1 else f"{name}#{counts[name]}"
        plans[key] = _plan_of(seen, plan)
    return plans[""] if is_layer(module) else plans


def _plan_of(seen: Seen, plan: Callable[[Seen, str | None], Plan]) -> Plan:
    cls = seen.kind
    if seen.is_one_call:
        return plan(seen, None)
    if issubclass(cls, (NormalizationLayer, *_WHITENING)):
        reason = f"{cls.__name__} is more than one call of the fused op: its traffic is not counted"
        backend = "torch" if issubclass(cls, _WHITENING) else plan(seen, None).backend
        fused = describe_fused(index(seen.activation), seen.residual)
        return Plan(backend, cls.__name__, 0, math.nan, math.nan, 0, 0, 0, reason, fused)
    reason = f"{cls.__module__.partition('.')[0]}'s {cls.__name__}, which fastbn.convert has not replaced"
    return dataclasses.replace(plan(seen, "torch"), reason=reason)


def _calls(
    module: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> list[tuple[str, Seen]]:
    """Run a copy of a module and return the calls of its layers by name."""
    if hasattr(module, "_orig_mod"):
        raise ValueError(
            "explain: expected a model that is not compiled, since the compiler chooses differently, got one"
        )
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        raise ValueError(
            "explain: expected a model that is not a ScriptModule, whose layers run torch's own operations, got one"
        )
    tensors = [*module.parameters(), *module.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError("explain: expected a module whose lazy layers have seen an input, got one that has not")
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    device = torch.get_default_device() if first is None else first.device
    mode = fake_tensors()
    try:
        twin = copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        raise _cannot("be copied", module, error) from error
    with mode, torch.no_grad():
        calls: list[tuple[str, Seen]] = []
        for name, layer in list(twin.named_modules()):
            if is_layer(layer):
                _listen(layer, lambda seen, name=name: calls.append((name, seen)), layer is twin)  # type: ignore[misc]
        inputs = [
            make_empty(
                shape,
                dtype=dtype or (None if first is None else first.dtype),
                device=device,
                memory_format=torch.contiguous_format if memory_format is None else memory_format,
            )
            for shape in shapes
        ]
        try:
            twin(*inputs)
        except Exception as error:  # whatever the model raises
            got = ", ".join(map(str, shapes))
            raise _cannot(f"run on tensors of shape {got} without values", module, error) from error
    return calls


def _cannot(what: str, module: nn.Module, error: Exception) -> ValueError:
    said = (str(error).splitlines() or [""])[0]
    return ValueError(f"explain: {type(module).__name__} cannot {what}: {type(error).__name__}: {said}")


def _listen(layer: Any, tell: Callable[[Seen], None], is_whole_model: bool) -> None:
    """Make a layer of the copy tell of its calls."""
    kind = class_without_checkpoint_safety(type(layer))
    is_one_call = kind in (*_ONE_CALL, *_FROZEN) or containers.is_layer(layer)
    if kind is SyncBatchNorm:  # a BatchNorm where there are no other processes
        is_one_call = not (torch.distributed.is_available() and torch.distributed.is_initialized())

    def heard(input: Tensor, residual: Any, activation: str | None, param: float | None) -> Tensor:
        training = layer.training and not isinstance(layer, _FROZEN)
        if isinstance(layer, BatchNormBase) and layer.running_mean is None and layer.running_var is None:
            training = True
        if is_one_call:
            _check_input(layer, input, training)
        fused = residual is not None, activation, param
        tell(Seen(layer, kind, is_one_call, input, *fused, training, is_whole_model))
        return torch.empty_like(input)

    if containers.is_layer(layer):
        _listen_to_layer_of_another_library(layer, heard)
    elif isinstance(layer, NormalizationLayer):
        own = layer._check_input_dim if hasattr(layer, "_check_input_dim") else None

        def _normalize(input: Tensor, *rest: Any) -> Tensor:
            if own is not None:
                own(input)
            return heard(input, *rest)

        vars(layer)["_normalize"] = _normalize
        if not is_one_call:
            # Its forward may call something else.
            vars(layer)["forward"] = lambda input, *args, **kwargs: _normalize(
                input, kwargs.get("residual"), layer.activation, vars(layer).get("activation_param")
            )
    else:
        activation = getattr(layer, "activation", None)
        activation = activation if isinstance(layer, _WHITENING) else None

        def tell_of_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard(next(iter((*args, *kwargs.values()))), None, activation, None)

        layer.register_forward_pre_hook(tell_of_input, with_kwargs=True)


def _check_input(layer: Any, input: Tensor, training: bool) -> None:
    """Raise ValueError for what the layer would refuse: other channels than its own, and no spread to normalise by."""
    own = next((t for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias) if t is not None), None)
    if own is not None and input.shape[1] != own.numel():
        raise ValueError(f"expected {own.numel()} channels, got input size {list(input.shape)}")
    if training and input.numel() == input.shape[1]:
        raise ValueError(f"expected more than 1 value per channel when training, got input size {list(input.shape)}")


def _listen_to_layer_of_another_library(layer: Any, heard: Callable[..., Tensor]) -> None:
    """Give the layer a class of its own, since what wants to fuse something into it asks for its class's methods."""
    original = class_without_checkpoint_safety(type(layer))._fastbn_original

    def _with_epilogue(self: Any, input: Tensor, epilogue: Epilogue) -> Any:
        joined = join(Epilogue(after=LAYERS[original].steps(self)), epilogue)
        found = None if joined is None else read(joined, input)
        if found is not None:
            return heard(input, *found)
        if epilogue is not NOTHING:
            return epilogue.apply(_with_epilogue(self, input, NOTHING))
        return heard(input, None, None, None)

    body = {"_with_epilogue": _with_epilogue, "forward": functools.partialmethod(_with_epilogue, epilogue=NOTHING)}
    made: Any = type(type(layer).__name__, (type(layer),), body)
    made._epilogue_owner = made
    layer.__class__ = made
