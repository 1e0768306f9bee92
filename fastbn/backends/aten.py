"""torch's own operations, for the calls that no op of fastbn can take, and for those that torch has to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn._C import DeviceLimits
from fastbn.backends.reference.activations import activation as activate
from fastbn.ops.dispatch import Call, Plan


class AtenBackend:
    """torch.nn.functional.batch_norm, an addition and an activation. It takes every call, if only to refuse it."""

    name = "torch"
    ops = None
    device_types: tuple[str, ...] = ()

    def why_not(self, call: Call) -> str | None:
        return None

    def saves_mask(self, input: Tensor) -> bool:
        return False

    def plan(self, call: Call, direction: str, reason: str, limits: DeviceLimits | None = None) -> Plan:
        # Batch norm, addition and activation each read and write the whole tensor.
        residual, has_activation = call.residual is not None, call.activation != 0
        if direction == "forward":
            reads = (2.0 if call.training else 1.0) + 2 * residual + has_activation
            writes = 1.0 + residual + has_activation
        else:
            reads = (4.0 if call.training else 2.0) + 2 * has_activation
            writes = 1.0 + has_activation
        return Plan(self.name, "batch_norm", 0, reads, writes, 0, 0, 0, reason)

    def availability(self) -> str:
        return f"yes: torch {torch.__version__}"


TORCH = AtenBackend()


def batch_norm(call: Call) -> Tensor:
    """Run a call by torch's operations, in whose words it may fail; then no buffer has changed."""
    input, residual, weight, bias, running_mean, running_var, counter, momentum, eps, activation, training, param = call
    if momentum is not None:
        factor = momentum
    else:
        factor = 0.0 if counter is None else 1.0 / float(counter + 1)
    if counter is not None and not torch.compiler.is_compiling() and counter.is_inference():
        counter.add_(0)  # raises what counting would raise after the averages had moved
    if training and weight is not None and bias is not None and weight.dtype != bias.dtype:
        # torch compares the two after it has moved the averages, so it is first called with copies of them.
        mean, var = (t if t is None else t.clone() for t in (running_mean, running_var))
        F.batch_norm(input, mean, var, weight, bias, True, factor, eps)
    # torch's backward of (N, C) reads beside a vector that is not contiguous.
    weight, bias = _contiguous(weight), _contiguous(bias)
    if not training:
        running_mean, running_var = _contiguous(running_mean), _contiguous(running_var)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    output = activate(output if residual is None else output + residual, activation, param)
    if counter is not None:  # after all that may raise
        counter.add_(1)
    return output


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()
