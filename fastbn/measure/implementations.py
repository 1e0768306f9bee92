"""The rivals, each called as a layer of a user's model: torch.nn's is followed by addition and activation in place.

`prepare` returns a call without arguments, which `gate` checks and `timer` times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbn
from fastbn._torch import which_batch_norm
from fastbn.backends import registry
from fastbn.measure.inputs import EPS, MOMENTUM, Inputs
from fastbn.measure.operations import Operation
from fastbn.measure.workload import Workload

AGAIN = " (again)"
STOCK, FASTBN = "torch", "fastbn"
_STOCK_MODULES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_FAST_MODULES = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}
_COMPILE_MODES = {"compile": "default", "compile-max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Prepared:
    """A prepared call.

    `call` runs the operation once and returns output, grad_input, grad_weight, grad_bias and grad_residual, as far as
    the operation has them; `forward` runs only the forward pass. `module` holds the running statistics. `kernel` names
    the kernels that run.
    """

    call: Callable[[], tuple[Tensor, ...]]
    forward: Callable[[], Tensor]
    module: Any
    kernel: str


@dataclass(frozen=True)
class Implementation:
    """A rival. `why_not` returns why it cannot take a workload, or None; `prepare` raises the errors of its library.

    If it `compiles`, it takes seconds per workload, and takes part only in those that ask for it.
    """

    name: str
    prepare: Callable[[Operation, Inputs], Prepared]
    why_not: Callable[[Workload], str | None] = lambda workload: None
    compiles: bool = False


def serving(device: torch.device) -> tuple[str | None, str]:
    """Return (the backend that serves tensors of a device, or None where fastbn leaves them to torch, and why)."""
    plan = fastbn.explain(torch.empty(2, 2, device=device))
    return None if plan.backend == "torch" else plan.backend, plan.reason


def _can_serve(backend: str, device: torch.device) -> bool:
    if device.type not in registry.get(backend).device_types:  # Triton's interpreter would run on a CPU
        return False
    try:
        fastbn.explain(torch.empty(2, 2, device=device), backend=backend)
    except ValueError:
        return False
    return True


def implementations(device: torch.device) -> list[Implementation]:
    """Return all implementations that this installation has for a device, in the order of the tables."""
    default, reason = serving(device)
    others = [name for name in registry.names() if name not in (default, "reference", "torch")]
    compiled = [
        Implementation(name, functools.partial(_prepare_compiled, mode), compiles=True)
        for name, mode in _COMPILE_MODES.items()
    ]
    return [
        Implementation(STOCK, _prepare_stock),
        *compiled,
        *([Implementation("onednn", _prepare_onednn, _why_not_onednn)] if device.type == "cpu" else []),
        Implementation(FASTBN, _prepare_fastbn, lambda workload: None if default else reason),
        *[
            Implementation(f"{FASTBN}-{name}", functools.partial(_prepare_backend, name))
            for name in others
            if _can_serve(name, device)
        ],
    ]


def _module(classes: Mapping[int, Any], operation: Operation, inputs: Inputs, **options: Any) -> Any:
    x = inputs.input
    module = classes[x.dim()](x.size(1), EPS, MOMENTUM, device=x.device, **options)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(inputs, name))
    return module.train(operation.training)


def _prepared(
    operation: Operation,
    module: Any,
    forward: Callable[..., Tensor],
    x: Tensor,
    residual: Tensor,
    grad_out: Tensor,
    kernel: str,
) -> Prepared:
    """Prepare an operation: `forward` takes x, and the residual where the operation has one."""
    gradients = operation.mode != "eval"
    arguments: tuple[Tensor, ...] = (x, residual) if operation.residual else (x,)
    if gradients:
        arguments = tuple(tensor.detach().requires_grad_() for tensor in arguments)
    leaves = (arguments[0], module.weight, module.bias, *arguments[1:])

    def run() -> Tensor:
        return forward(*arguments)

    if not gradients:
        run = torch.no_grad()(run)

    def call() -> tuple[Tensor, ...]:
        output = run()
        return (output, *torch.autograd.grad(output, leaves, grad_out)) if operation.backward else (output,)

    return Prepared(call, run, module, kernel)


def _stock_forward(operation: Operation, module: nn.Module) -> Callable[..., Tensor]:
    """Add and activate in place where autograd allows it, as model code does (torchvision's blocks, for one)."""

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        output = module(x)
        if residual is not None:
            output += residual
        if operation.activation == "relu":
            return F.relu(output, inplace=True)
        return output if operation.activation is None else getattr(F, operation.activation)(output)

    return forward


def _prepare_stock(operation: Operation, inputs: Inputs) -> Prepared:
    module = _module(_STOCK_MODULES, operation, inputs)
    vectors = (module.weight, module.bias, module.running_mean, module.running_var)
    kernel = which_batch_norm(inputs.input, *vectors, module.training, EPS).name.lower()
    forward = _stock_forward(operation, module)
    return _prepared(operation, module, forward, inputs.input, inputs.residual, inputs.grad_out, kernel)


def _prepare_compiled(mode: str, operation: Operation, inputs: Inputs) -> Prepared:
    # CUDA graphs are off: they would copy the input, which no producer writes in place here, and device time is what
    # is measured. Each gets a fresh closure, so that no earlier shape makes this one dynamic.
    module = _module(_STOCK_MODULES, operation, inputs)
    forward = torch.compile(_stock_forward(operation, module), mode=mode, fullgraph=True, dynamic=False)
    return _prepared(operation, module, forward, inputs.input, inputs.residual, inputs.grad_out, "inductor")


def _prepare_onednn(operation: Operation, inputs: Inputs) -> Prepared:
    module = _module(_STOCK_MODULES, operation, inputs)
    x, residual, grad_out = (tensor.to_mkldnn() for tensor in (inputs.input, inputs.residual, inputs.grad_out))
    return _prepared(operation, module, _stock_forward(operation, module), x, residual, grad_out, "onednn")


def _why_not_onednn(workload: Workload) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if workload.dtype != torch.float32:
        return "oneDNN is timed in float32 alone, to keep the suite short"
    if workload.case.layout != "contiguous" or len(workload.case.shape) != 4:
        return "oneDNN tensors have a layout of their own, made from contiguous images"
    if workload.operation.mode == "frozen":
        return "oneDNN has no backward in evaluation mode"
    if workload.operation.activation not in (None, "relu"):
        return f"torch has no {workload.operation.activation} for oneDNN tensors"
    return None


def _prepare_fastbn(operation: Operation, inputs: Inputs) -> Prepared:
    module = _module(_FAST_MODULES, operation, inputs, activation=operation.activation)
    plan = fastbn.explain(
        inputs.input,
        "backward" if operation.backward else "forward",
        activation=operation.activation,
        residual=operation.residual,
        training=operation.training,
    )
    kernel = f"{plan.backend}: {plan.kernel}"
    return _prepared(operation, module, module, inputs.input, inputs.residual, inputs.grad_out, kernel)


def _prepare_backend(backend: str, operation: Operation, inputs: Inputs) -> Prepared:
    module = _module(_FAST_MODULES, operation, inputs, activation=operation.activation)

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return fastbn.functional.batch_norm(
            x,
            module.running_mean,
            module.running_var,
            module.weight,
            module.bias,
            module.training,
            MOMENTUM,
            EPS,
            residual=residual,
            activation=operation.activation,
            num_batches_tracked=module.num_batches_tracked,
            backend=backend,
        )

    return _prepared(operation, module, forward, inputs.input, inputs.residual, inputs.grad_out, backend)
