"""Parity of fastbn and torch.nn.functional on one device: the error of each against float64 torch operations.

float64 itself is compared with numpy.longdouble. Errors are largest absolute differences in ulp: the spacing of the
quantity's dtype at its largest exact value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbn.backends import crossings
from fastbn.functional import batch_norm
from fastbn.testing import cases, extended, tolerance

EPS, MOMENTUM = 1e-5, 0.1
_LEAVES = ("input", "weight", "bias", "residual")
_OPERANDS = ("input", "running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class VerifyCase:
    """A call of fastbn to compare, with what is fused, on normal data of shape (N, C, *).

    `layout` is one of `fastbn.testing.cases.LAYOUTS`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    relu: bool = False
    residual: bool = False
    training: bool = True
    mean: float = 0.5
    std: float = 2.0
    parameter_dtype: torch.dtype = torch.float32

    @property
    def operation(self) -> str:
        return "bn" + "+add" * self.residual + "+relu" * self.relu


@dataclass(frozen=True)
class Comparison:
    """Errors of one quantity in ulp; `scale` is its largest absolute value, `floor` the bound where stock has less."""

    quantity: str
    fastbn: float
    stock: float
    scale: float
    floor: float = tolerance.ACCEPTED_ULPS

    @property
    def bound(self) -> float:
        return max(self.stock, self.floor)

    @property
    def passed(self) -> bool:
        return self.fastbn <= self.bound


def compare_case(case: VerifyCase, device: str | torch.device = "cpu") -> Iterator[Comparison]:
    """Run `case` on `device` through fastbn, stock and reference, and yield a comparison for each quantity.

    Quantities are the output, the running statistics (training) and the gradients.
    """
    data = _draw(case, device)
    reference = _run(_compose, case, {k: v.double() for k, v in data.items()})
    data["grad_out"] = _away_from_kink(case, data["grad_out"], reference.pop("z"))
    reference = _run(_compose, case, {k: v.double() for k, v in data.items()})
    del reference["z"]
    fast, stock = _run(_fastbn, case, data), _run(_stock, case, data)
    if case.dtype == torch.float64:
        for quantity, exact in _extend(case, data).items():
            ours, theirs = (extended.error_in_ulp(got[quantity], exact) for got in (fast, stock))
            yield Comparison(quantity, ours, theirs, float(abs(exact).max()), tolerance.ACCEPTED_ULPS_FLOAT64)
        return
    for quantity, expected in reference.items():
        dtype = stock[quantity].dtype
        ours, theirs = (tolerance.error_in_ulp(got[quantity], expected, dtype) for got in (fast, stock))
        yield Comparison(quantity, ours, theirs, expected.abs().max().item())


def _draw(case: VerifyCase, device: str | torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(case.shape))

    def normal(shape: int | tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean

    channels = case.shape[1]
    parameters = {
        "weight": normal(channels, 1.0, 0.2),
        "bias": normal(channels, 0.0, 0.5),
        "running_mean": normal(channels, case.mean, 0.1 * case.std),
        "running_var": normal(channels, 0.0, 0.1).exp() * case.std**2,
    }
    data = {name: value.to(device, case.parameter_dtype) for name, value in parameters.items()}
    data["input"] = cases.lay_out(normal(case.shape, case.mean, case.std).to(device, case.dtype), case.layout)
    data["grad_out"] = cases.lay_out(normal(case.shape).to(device, case.dtype), case.layout)
    if case.residual:
        data["residual"] = cases.lay_out(normal(case.shape).to(device, case.dtype), case.layout)
    return data


def _away_from_kink(case: VerifyCase, grad_out: Tensor, z: Tensor) -> Tensor:
    """Zero the gradient where rounding decides on which side of relu's kink an element lies: either answer is right."""
    if not case.relu:
        return grad_out
    margin = tolerance.forward_tolerance(case.dtype, z.numel() // z.shape[1], z.abs().max()).to(z.device)
    return torch.where(z.abs() < margin, torch.zeros_like(grad_out), grad_out)


def _run(
    implementation: Callable[[VerifyCase, dict[str, Tensor]], dict[str, Tensor]],
    case: VerifyCase,
    data: dict[str, Tensor],
) -> dict[str, Tensor]:
    leaves = [name for name in _LEAVES if name in data]
    tensors = {name: value.detach().clone().requires_grad_(name in leaves) for name, value in data.items()}
    result = implementation(case, tensors)
    gradients = torch.autograd.grad(result["output"], [tensors[name] for name in leaves], tensors["grad_out"])
    if case.training:
        result |= {name: tensors[name] for name in ("running_mean", "running_var")}
    return {name: value.detach() for name, value in result.items()} | {
        f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def _compose(case: VerifyCase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    input, running_mean, running_var, weight, bias = (tensors[name] for name in _OPERANDS)

    def per_channel(tensor: Tensor) -> Tensor:
        return tensor.view(1, -1, *[1] * (input.dim() - 2))

    mean, var = running_mean, running_var
    if case.training:
        count = input.numel() // input.shape[1]
        var, mean = torch.var_mean(input, [d for d in range(input.dim()) if d != 1], correction=0)
        with torch.no_grad():
            running_mean.lerp_(mean, MOMENTUM)
            running_var.lerp_(var * count / (count - 1), MOMENTUM)
    z = (input - per_channel(mean)) * per_channel(weight / (var + EPS).sqrt()) + per_channel(bias)
    z = z + tensors["residual"] if case.residual else z
    return {"z": z, "output": z.relu() if case.relu else z}


def _extend(case: VerifyCase, data: dict[str, Tensor]) -> dict[str, extended.Array]:
    """Compute the results of `_run(_compose, ...)` in longdouble."""
    wide = {name: extended.wide(value) for name, value in data.items()}
    x, weight, grad_z = wide["input"], wide["weight"], wide["grad_out"]
    deviation, var = extended.deviations(x, wide["running_mean"]), wide["running_var"]
    result: dict[str, extended.Array] = {}
    if case.training:
        count = x.size // x.shape[1]
        deviation, (mean, var) = extended.deviations(x), extended.statistics(x)
        batch = {"running_mean": mean, "running_var": var * count / (count - 1)}
        result = {name: extended.running(wide[name], value, MOMENTUM) for name, value in batch.items()}
    inv_std = extended.inverse_std(var, EPS)
    z = extended.normalize(deviation, weight, wide["bias"], inv_std) + wide.get("residual", 0)
    if case.relu:
        z, grad_z = z * (z > 0), grad_z * (z > 0)
    gradients = extended.gradients(grad_z, deviation, weight, inv_std, case.training)
    result = {"output": z, **result}
    result |= {f"grad_{name}": value for name, value in zip(("input", "weight", "bias"), gradients, strict=True)}
    return result | ({"grad_residual": grad_z} if case.residual else {})


def _stock(case: VerifyCase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    input, running_mean, running_var, weight, bias = (tensors[name] for name in _OPERANDS)
    z = F.batch_norm(input, running_mean, running_var, weight, bias, case.training, MOMENTUM, EPS)
    z = z + tensors["residual"] if case.residual else z
    return {"output": z.relu() if case.relu else z}


def _fastbn(case: VerifyCase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    input, running_mean, running_var, weight, bias = (tensors[name] for name in _OPERANDS)
    arguments = (input, running_mean, running_var, weight, bias, case.training, MOMENTUM, EPS)
    residual, activation = tensors.get("residual"), "relu" if case.relu else None
    with crossings.ignored():
        return {"output": batch_norm(*arguments, residual=residual, activation=activation)}
