"""One parity case: fastbn and torch.nn.functional on one device, each against float64 torch operations, or where it
is float64 itself, against numpy.longdouble.

Errors are largest absolute differences in ulp: the spacing of the quantity's dtype at the largest value it should have.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastbn.functional import batch_norm
from fastbn.testing import extended

EPS, MOMENTUM = 1e-5, 0.1
# Two roundings to the output's dtype: a correct implementation may need them however exact its arithmetic. float64 has
# no wider type to be computed in, and so rounds at every step.
FLOOR_ULP, FLOOR_ULP_FLOAT64 = 2.0, 4.0

_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True)
class Case:
    """What to compare. `layout`: contiguous, channels_last, channels_last_3d or strided (every second column)."""

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
    """Errors of one quantity in ulp; `scale` is the largest absolute value expected, `floor` the least bound."""

    quantity: str
    fastbn: float
    stock: float
    scale: float
    floor: float = FLOOR_ULP

    @property
    def bound(self) -> float:
        return max(self.stock, self.floor)

    @property
    def passed(self) -> bool:
        return self.fastbn <= self.bound


def compare(case: Case, device: torch.device) -> Iterator[Comparison]:
    """Run `case` on `device` through fastbn, stock and reference; yield a comparison for each quantity it yields:
    output and running statistics (training), then the gradients."""
    data = _draw(case, device)
    reference = _run(_compose, case, {k: v.double() for k, v in data.items()})
    data["grad_out"] = _away_from_kink(case, data["grad_out"], reference.pop("z"))
    reference = _run(_compose, case, {k: v.double() for k, v in data.items()})
    del reference["z"]
    fast, stock = _run(_fastbn, case, data), _run(_stock, case, data)
    if case.dtype == torch.float64:
        for quantity, exact in _extend(case, data).items():
            errors = (extended.error_in_ulp(got[quantity], exact) for got in (fast, stock))
            yield Comparison(quantity, *errors, float(abs(exact).max()), FLOOR_ULP_FLOAT64)
        return
    for quantity, expected in reference.items():
        scale = expected.abs().max().item()
        ulp = _ulp(stock[quantity].dtype, scale)
        yield Comparison(quantity, *(_distance(got[quantity], expected) / ulp for got in (fast, stock)), scale)


def _draw(case, device):
    generator = torch.Generator().manual_seed(sum(case.shape))

    def normal(shape, mean=0.0, std=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean

    channels = case.shape[1]
    parameters = {
        "weight": normal(channels, 1.0, 0.2),
        "bias": normal(channels, 0.0, 0.5),
        "running_mean": normal(channels, case.mean, 0.1 * case.std),
        "running_var": normal(channels, 0.0, 0.1).exp() * case.std**2,
    }
    data = {name: value.to(device, case.parameter_dtype) for name, value in parameters.items()}
    data["input"] = _lay_out(normal(case.shape, case.mean, case.std).to(device, case.dtype), case.layout)
    data["grad_out"] = _lay_out(normal(case.shape).to(device, case.dtype), case.layout)
    if case.residual:
        data["residual"] = _lay_out(normal(case.shape).to(device, case.dtype), case.layout)
    return data


def _lay_out(tensor, layout):
    if layout == "strided":
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    return tensor.contiguous(memory_format=_FORMATS[layout])


def _away_from_kink(case, grad_out, z):
    """No gradient where rounding alone decides on which side of relu's kink an element lies: either answer is right."""
    if not case.relu:
        return grad_out
    margin = max(1e-3, 4 * torch.finfo(case.dtype).eps)
    return torch.where(z.abs() < margin, torch.zeros_like(grad_out), grad_out)


def _run(implementation, case, data):
    leaves = [name for name in ("input", "weight", "bias", "residual") if name in data]
    tensors = {name: value.detach().clone().requires_grad_(name in leaves) for name, value in data.items()}
    result = implementation(case, **{name: value for name, value in tensors.items() if name != "grad_out"})
    gradients = torch.autograd.grad(result["output"], [tensors[name] for name in leaves], tensors["grad_out"])
    if case.training:
        result |= {name: tensors[name] for name in ("running_mean", "running_var")}
    return {name: value.detach() for name, value in result.items()} | {
        f"grad_{name}": gradient for name, gradient in zip(leaves, gradients)
    }


def _compose(case, input, weight, bias, running_mean, running_var, residual=None):
    def per_channel(tensor):
        return tensor.view(1, -1, *[1] * (input.dim() - 2))

    mean, var = running_mean, running_var
    if case.training:
        count = input.numel() // input.shape[1]
        var, mean = torch.var_mean(input, [d for d in range(input.dim()) if d != 1], correction=0)
        with torch.no_grad():
            running_mean.lerp_(mean, MOMENTUM)
            running_var.lerp_(var * count / (count - 1), MOMENTUM)
    z = (input - per_channel(mean)) * per_channel(weight / (var + EPS).sqrt()) + per_channel(bias)
    z = z if residual is None else z + residual
    return {"z": z, "output": z.relu() if case.relu else z}


def _extend(case, data):
    """What `_run` makes of `_compose`, in longdouble."""
    wide = {name: extended.wide(value) for name, value in data.items()}
    x, weight, grad_z = wide["input"], wide["weight"], wide["grad_out"]
    deviation, var, result = extended.deviations(x, wide["running_mean"]), wide["running_var"], {}
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


def _stock(case, input, weight, bias, running_mean, running_var, residual=None):
    z = F.batch_norm(input, running_mean, running_var, weight, bias, case.training, MOMENTUM, EPS)
    z = z if residual is None else z + residual
    return {"output": z.relu() if case.relu else z}


def _fastbn(case, input, weight, bias, running_mean, running_var, residual=None):
    activation = "relu" if case.relu else None
    fused = {"residual": residual, "activation": activation}
    return {"output": batch_norm(input, running_mean, running_var, weight, bias, case.training, MOMENTUM, EPS, **fused)}


def _ulp(dtype, scale):
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale > 0 else torch.finfo(dtype).tiny


def _distance(got, expected):
    """Largest absolute difference; infinite for a shape that is wrong or a value that is not finite."""
    if got.shape != expected.shape:
        return math.inf
    difference = (got.double() - expected).abs().max().item()
    return difference if math.isfinite(difference) else math.inf
