"""Decides which implementations of a network may be timed: those whose results agree with torch's."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from bench.network_cases import NETWORKS, NetworkCase
from bench.network_models import TORCH, Models, Work, is_ours, model_of
from bench.results import Refusal
from fastbn.measure.implementations import serving
from fastbn.measure.workload import dtype_name

# The fraction of the norm of all gradients below which one may be rounding errors alone.
CANCELLED = 1e-12
_GRADIENT = "the gradient of "


def gate(
    works: dict[str, Work], disagreements: dict[str, str | None], case: NetworkCase, device: torch.device
) -> tuple[dict[str, float], list[Refusal]]:
    """Run each once. Return the loss of each that may be timed, by name, and why the others may not.

    Refused are those that fastbn cannot run here, that raise an error, and that disagree with torch's: in the loss by
    more than `loss_tolerance`, or in float64, as `float64_disagreements` says. Without torch's none is timed.
    """
    backend, why = serving(device)
    tolerance = loss_tolerance(case.dtype, device)
    losses, refusals = {}, []

    def refuse(name: str, wrong: bool, reason: str) -> None:
        refusals.append(Refusal(case.name, dtype_name(case.dtype), case.op, name, wrong, reason))

    for name, work in works.items():
        if is_ours(name) and backend is None:
            refuse(name, False, why)
            continue
        try:
            loss = work.check()
        except Exception as error:  # any error of a model or of a compiler is the reason why it is not timed
            refuse(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
            if name == TORCH:
                return {}, refusals
            continue
        expected = losses.setdefault(TORCH, loss)
        reason = disagreements[model_of(name)]
        if reason is None and not abs(loss - expected) <= tolerance * expected:
            reason = f"the first loss is {loss:.6g}, torch's {expected:.6g}"
        if reason is None:
            losses[name] = loss
        else:
            refuse(name, True, reason)
    return losses, refusals


def loss_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative tolerance of the first loss: half of the digits of the type that convolutions compute in.

    In training mode an untrained ResNet-50 multiplies rounding errors by some thousands on the way to its scores, which
    is 1 / sqrt(eps) of float32. In bfloat16 the scores then agree in little more than their mean over the batch; the
    loss, itself a mean over the batch, moves less.
    """
    tf32_eps = 2**-10  # what cuDNN's convolutions of float32 round to unless told otherwise
    eps = tf32_eps if dtype == torch.float32 and device.type == "cuda" else torch.finfo(dtype).eps
    return math.sqrt(eps)


def float64_disagreements(models: Models, layout: str) -> dict[str, str | None]:
    """Return, by name, why a model's results in float64 differ from torch's by more than rounding, or None.

    In bfloat16 the loss agrees so loosely that a network without one of its additions may pass. So a small batch in
    float64 has to agree too, in the memory format of the case, for each format has its own ways through a layer.
    """
    if layout not in models.verdicts:
        input = models.prepare(NETWORKS[models.network].small, layout, training=True)
        expected = float64_passes(models.modules[TORCH], input)
        models.verdicts[layout] = {name: _verdict(model, input, expected) for name, model in models.modules.items()}
    return models.verdicts[layout]


def _verdict(model: nn.Module, input: tuple[Tensor, ...], expected: dict[str, Tensor]) -> str | None:
    try:
        return difference(float64_passes(model, input), expected)
    except Exception as error:  # where torch's own model runs, any error is a wrong result
        return f"in float64, {type(error).__name__}: {error}".splitlines()[0]


def float64_passes(model: nn.Module, input: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Compute scores of both modes, running statistics and gradients of a copy of the model in float64."""
    model = copy.deepcopy(model).double()
    input = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in input)
    with torch.no_grad():
        evaluated = model.eval()(*input)
    scores = model.train()(*input)
    weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype, device=scores.device)
    (scores * weights.view_as(scores)).sum().backward()
    gradients = {f"{_GRADIENT}{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"the scores": scores.detach(), "the evaluation": evaluated, **dict(model.named_buffers()), **gradients}


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Return which result of `float64_passes` differs by more than rounding, or None.

    Half of the digits have to agree, as in a loss. Rounding grows less here, except for batches so small that the last
    BatchNorms see two or three values per channel. A gradient that is 0 except for rounding, such as that of a bias
    that a later BatchNorm takes away, is compared with the norm of all gradients.
    """
    tolerance = math.sqrt(torch.finfo(torch.float64).eps)
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}  # integers have none
    rounding = CANCELLED * math.hypot(*(norm for name, norm in norms.items() if name.startswith(_GRADIENT)))
    for name, norm in norms.items():
        distance = torch.dist(actual[name].double(), expected[name].double()).item()
        if not distance <= max(tolerance * norm, rounding if name.startswith(_GRADIENT) else 0):
            return f"in float64, {name} is off torch's by {distance:.2g}, and its norm is {norm:.2g}"
    return None
