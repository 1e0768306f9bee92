"""The correctness gate: no implementation is timed before its results agree with the float64 reference.

It checks the output, running statistics and gradients of a call, dtype, shape and memory format, and that everything is
finite. For a large case the reference is computed for channels spread evenly from the first to the last: the others are
the same code on other data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbn.backends import reference
from fastbn.backends.reference.formulas import reduced_dims
from fastbn.measure.implementations import Implementation, Prepared
from fastbn.measure.inputs import EPS, MOMENTUM, Inputs
from fastbn.measure.operations import Operation
from fastbn.measure.workload import Workload
from fastbn.ops.activations import index as activation_index
from fastbn.testing import tolerance

MAX_COMPARED = 2**19  # elements
# Roundings to the tensor's dtype in unfused rivals, where fastbn rounds once: the normalised value, the sum with the
# residual, the gradient after the activation, and one for the effect of the first on the last.
ROUNDINGS = 4
_GRADS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
_PER_CHANNEL = ("grad_weight", "grad_bias")


@dataclass(frozen=True)
class Expected:
    """Float64 results of those channels by name, each with its tolerance."""

    channels: Tensor
    results: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Admission:
    """Whether a rival may be timed: its prepared call, or None and the reason; `wrong` where a result was wrong."""

    name: str
    prepared: Prepared | None
    wrong: bool
    reason: str


def admit(rivals: Iterable[Implementation], workload: Workload, inputs: Inputs) -> Iterator[Admission]:
    """Prepare each rival that takes the workload, and compare its results with float64."""
    # Otherwise earlier shapes count towards torch.compile's limit of recompilations, above which it runs eagerly.
    torch.compiler.reset()
    expected = None
    for rival in rivals:
        reason, wrong, prepared = rival.why_not(workload), False, None
        if reason is None:
            try:
                prepared = rival.prepare(workload.operation, inputs)
                expected = expected or expect(workload.operation, inputs)
                reason = why_wrong(prepared, inputs, expected)
                wrong = reason is not None
            except Exception as error:  # any error of a rival's library is the reason why it is not timed
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Admission(rival.name, prepared if reason is None else None, wrong, reason or "")


def expect(operation: Operation, inputs: Inputs) -> Expected:
    """Compute the results that every implementation of an operation must give for these inputs."""
    channels = _compared_channels(inputs)
    return Expected(channels, dict(_reference(operation, inputs, channels)))


def why_wrong(prepared: Prepared, inputs: Inputs, expected: Expected) -> str | None:
    """Run the call for the first time. Returns what is wrong with its results, or None."""
    results = [result.to_dense() if result.is_mkldnn else result for result in prepared.call()]  # contiguous
    names = ("output", *_GRADS)[: len(results)]
    tensors = dict(zip(names, (result.detach() for result in results)))
    buffers = {name: getattr(prepared.module, name) for name in ("running_mean", "running_var")}
    for name, tensor in tensors.items():
        wrong = _why_wrong_form(tensor, inputs.weight if name in _PER_CHANNEL else inputs.input)
        if wrong:
            return f"{name}: {wrong}"
    for name, got in (tensors | buffers).items():
        exact, allowed = expected.results[name]
        picked = got[expected.channels] if got.dim() == 1 else got[:, expected.channels]
        error = (picked.double() - exact).abs()
        # `error > allowed` would let NaN pass.
        if not bool((error <= allowed).all()):
            excess = torch.where(error <= allowed, 0.0, error / allowed)
            at = int(excess.nan_to_num(torch.inf).argmax())
            pick = [t.expand_as(error).flatten()[at].item() for t in (picked, exact, allowed)]
            return "{}: got {:.6g}, expected {:.6g} within {:.2g}".format(name, *pick)
    return None


def _why_wrong_form(tensor: Tensor, like: Tensor) -> str | None:
    if tensor.shape != like.shape:
        return f"expected shape {list(like.shape)}, got {list(tensor.shape)}"
    if tensor.dtype != like.dtype:
        return f"expected {like.dtype}, got {tensor.dtype}"
    memory_format = reference.suggest_memory_format(like)
    if not tensor.is_contiguous(memory_format=memory_format):
        return f"expected {memory_format}, got strides {tensor.stride()}"
    if not bool(tensor.isfinite().all()):
        return f"expected finite values, got {int((~tensor.isfinite()).sum())} that are not"
    return None


def _compared_channels(inputs: Inputs) -> Tensor:
    channels = inputs.case.channels
    number = min(channels, max(2, MAX_COMPARED // inputs.case.count))
    return torch.linspace(0, channels - 1, number, device=inputs.input.device).round().long().unique()


def _reference(operation: Operation, inputs: Inputs, channels: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield (name, (float64 result, tolerance)) for those channels."""
    x, grad_out = (t[:, channels].double() for t in (inputs.input, inputs.grad_out))
    residual = inputs.residual[:, channels].double() if operation.residual else None
    vectors = (inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var)
    weight, bias, running_mean, running_var = (t[channels].double() for t in vectors)
    activation, dtype, count = activation_index(operation.activation), inputs.input.dtype, inputs.case.count

    operands = (x, residual, weight, bias, running_mean, running_var)
    if operation.training:
        output, mean, inv_std, _ = reference.batch_norm_train(*operands, None, MOMENTUM, EPS, activation, False)
    else:
        output, mean, inv_std, _ = reference.batch_norm_frozen(*operands, EPS, activation, False)
    wide = (1, -1, *[1] * (x.dim() - 2))
    slope = (weight * inv_std).view(wide)
    # In float32, rounding the mean shifts xhat by |mean| / std roundings, and x * slope + shift has terms of that size.
    steepness = (mean.abs() * inv_std).view(wide)
    terms = (x * slope).abs() + bias.abs().view(wide)
    terms = terms if residual is None else terms + residual.abs()
    yield "output", (output, _element_tolerance(output, terms, dtype, count))
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        yield name, (statistic, _sum_error(count) * (statistic.abs() + 1))
    if not operation.backward:
        return
    given = (grad_out, x, residual, None, weight, bias, mean, inv_std, operation.training, activation)
    grads = dict(zip(_GRADS, reference.batch_norm_backward(*given, True, True, True, operation.residual)))
    xhat = (x - mean.view(wide)) * inv_std.view(wide)
    z = xhat * weight.view(wide) + bias.view(wide)
    grad_z = reference.activation_backward(grad_out, z if residual is None else z + residual, activation)
    for name, terms in (("grad_weight", grad_z.abs() * (xhat.abs() + steepness)), ("grad_bias", grad_z)):
        yield name, (grads[name], _sum_tolerance(terms, dtype, count))
    for name, terms in (("grad_input", grad_z * slope * (1 + steepness)), ("grad_residual", grad_z)):
        if grads[name].numel():
            yield name, (grads[name], _element_tolerance(grads[name], terms, dtype, count))


def _sum_error(count: int) -> float:
    """Return the relative error of a float32 sum.

    Not all rivals sum in a tree. The error of a serial sum is a random walk, which grows with the root of its length.
    """
    return torch.finfo(torch.float32).eps * (tolerance.ELEMENT_ROUNDINGS + count**0.5)


def _element_tolerance(exact: Tensor, terms: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Bound the error of elements at the scale of their channel's largest, or of the largest of `terms`: of these they
    are sums, which cancel where a channel has few values.
    """
    dims = reduced_dims(exact)
    scale = torch.maximum(exact.abs().amax(dims, keepdim=True), terms.abs().amax(dims, keepdim=True))
    return ROUNDINGS * tolerance.ulp(dtype, scale) + _sum_error(count) * scale


def _sum_tolerance(terms: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Bound the error of a sum of rounded terms, which err independently: six standard deviations, from the root of the
    sum of squares.
    """
    dims = reduced_dims(terms)
    rounding = ROUNDINGS * torch.finfo(dtype).eps * terms.square().sum(dims).sqrt()
    return 6 * rounding / 12**0.5 + _sum_error(count) * terms.abs().sum(dims)
