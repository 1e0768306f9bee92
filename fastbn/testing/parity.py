"""assert_parity: any BatchNorm, a layer or a function, against float64, over a table of cases with names and tags.

Each quantity is compared with its exact value, computed in float64 from the same tensors (that of float64 itself in
numpy.longdouble). Errors are in ulp: the spacing of the quantity's dtype at the largest term of which its channel's
values are sums, because terms may cancel. The bound is the larger of a few ulp and twice the error of torch's own
batch_norm on the same tensors, in channels that are about as hard: see `floor_of`, `OF_TORCH` and `AS_STEEP`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbn.testing import cases, extended, tolerance

EPS, MOMENTUM = 1e-5, 0.1
# The largest errors of two right implementations differ by their roundings. Where the values of a channel lie so close
# together that these are amplified, twice torch's error is allowed; fastbn needs 1.01 of it in this table.
OF_TORCH = 2.0
# Where the mean is large against the standard deviation, its rounding, in which luck has a part, is amplified by that
# ratio. Torch's error of a channel is therefore its largest in the channels with at most twice the ratio.
AS_STEEP = 2.0
# The counter of a layer before the call, so that momentum None averages over three batches.
BATCHES_BEFORE = 2
_SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ParityCase:
    """One call of a BatchNorm to check, on an input (N, C, *) of 2 to 5 dimensions.

    layout, data: of `fastbn.testing.cases.LAYOUTS` and `DATA`. parameter_dtype: of weight, bias and running statistics;
    None for float32 beside a half type, else that of the input. training: the mode of a layer. Without
    track_running_stats the statistics are the batch's in both modes. momentum: None averages over all batches.
    kind: the beginning of the name.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    data: str = "normal"
    training: bool = True
    affine: bool = True
    track_running_stats: bool = True
    momentum: float | None = MOMENTUM
    eps: float = EPS
    parameter_dtype: torch.dtype | None = None
    kind: str = "case"

    def __post_init__(self) -> None:
        if self.dtype not in _SHORT:
            raise ValueError(f"ParityCase: expected a dtype of {', '.join(map(str, _SHORT))}, got {self.dtype}")
        for name, known in (("layout", cases.LAYOUTS), ("data", cases.DATA)):
            if getattr(self, name) not in known:
                raise ValueError(f"ParityCase: expected a {name} of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.uses_batch and self.case.count == 1:
            raise ValueError(f"ParityCase: expected more than one value per channel in training, got {self.shape}")

    @property
    def case(self) -> cases.Case:
        return cases.make_case(self.kind, *self.shape, layout=self.layout, data=self.data)

    @property
    def uses_batch(self) -> bool:
        """Whether the call normalises by the statistics of the batch."""
        return self.training or not self.track_running_stats

    @property
    def moves_statistics(self) -> bool:
        return self.training and self.track_running_stats

    @property
    def vector_dtype(self) -> torch.dtype:
        """The dtype of weight, bias and running statistics."""
        if self.parameter_dtype is not None:
            return self.parameter_dtype
        return torch.float32 if self.dtype in _HALF else self.dtype

    @property
    def tags(self) -> frozenset[str]:
        """The words by which `parity_cases` selects."""
        case = self.case
        return frozenset(
            (
                "train" if self.training else "eval",
                str(self.dtype).removeprefix("torch."),
                {2: "bn1d", 3: "bn1d", 4: "bn2d", 5: "bn3d"}[len(self.shape)],
                "small" if case.numel <= cases.SMALL_NUMEL else "medium",
                "channels_last" if "channels_last" in self.layout else "contiguous",
                *(["half"] if self.dtype in _HALF else []),
                *(["half_parameters"] if self.vector_dtype in _HALF else []),
                *(["strided"] if self.layout in ("sliced", "sliced_channels_last", "transposed", "expanded") else []),
                *(["unaligned"] if self.layout.startswith("unaligned") else []),
                *(["numerics"] if self.data in ("offset", "constant") else []),
                *(["nonfinite"] if self.data in ("inf", "nan") else []),
                *(["empty"] if case.numel == 0 else []),
                *([] if self.affine else ["no_affine"]),
                *([] if self.track_running_stats else ["no_running_stats"]),
                *([] if self.momentum == MOMENTUM else ["momentum"]),
            )
        )

    def __str__(self) -> str:
        parts = [str(self.case), _SHORT[self.dtype], "train" if self.training else "eval"]
        parts += [f"p{_SHORT[self.vector_dtype]}"] * (self.parameter_dtype is not None)
        parts += ["no_affine"] * (not self.affine) + ["no_running_stats"] * (not self.track_running_stats)
        parts += [f"momentum_{self.momentum}"] * (self.momentum != MOMENTUM) + [f"eps_{self.eps}"] * (self.eps != EPS)
        return "-".join(parts)


def _table() -> Iterator[ParityCase]:
    for case in cases.ORDINARY:
        kind = case.name.partition("-")[0]
        for dtype in cases.DTYPES:
            for training in (True, False) if case.count != 1 else (False,):
                yield ParityCase(case.shape, dtype, case.layout, case.data, training, kind=kind)
    for shape, layout in (((6, 5, 4, 3), "contiguous"), ((6, 5, 4, 3), "channels_last"), ((64, 24), "contiguous")):
        for dtype in (torch.float32, torch.bfloat16):
            for training in (True, False):
                about: dict[str, Any] = dict(shape=shape, dtype=dtype, layout=layout, training=training, kind="option")
                yield ParityCase(**about, affine=False)
                yield ParityCase(**about, track_running_stats=False)
            yield ParityCase(shape, dtype, layout, momentum=None, kind="option")
            yield ParityCase(shape, dtype, layout, momentum=1.0, kind="option")
            yield ParityCase(shape, dtype, layout, eps=0.1, kind="option")
        for training in (True, False):
            yield ParityCase(shape, _HALF[0], layout, training=training, parameter_dtype=_HALF[0], kind="option")


PARITY_CASES: tuple[ParityCase, ...] = tuple(_table())
TAGS: tuple[str, ...] = tuple(sorted(set().union(*(case.tags for case in PARITY_CASES))))


def parity_cases(*tags: str, without: tuple[str, ...] = ()) -> tuple[ParityCase, ...]:
    """Return the cases of the table that have all of `tags` and none of `without`.

    Raises ValueError for a word that is none of `TAGS`, and where no case is left.
    """
    unknown = [tag for tag in (*tags, *without) if tag not in TAGS]
    if unknown:
        raise ValueError(f"parity_cases: expected tags of {', '.join(TAGS)}, got {', '.join(map(repr, unknown))}")
    found = tuple(case for case in PARITY_CASES if case.tags.issuperset(tags) and case.tags.isdisjoint(without))
    if not found:
        raise ValueError(f"parity_cases: expected tags that some case has, got {tags} without {without}")
    return found


@dataclass(frozen=True)
class Deviation:
    """The error of one quantity, in ulp, that exceeds its bound the most, where it is, and torch's there.

    error is infinite where got and exact are not both finite, nor both NaN or the same infinity. ulp: the unit, as an
    absolute value. floor: the ulp that are allowed where torch's error is smaller. torch_error: torch's largest in
    channels like that one; 0 where it is as large as the terms themselves, and NaN where it does not count.
    """

    quantity: str
    position: tuple[int, ...]
    got: float
    exact: float
    error: float
    torch_error: float
    floor: float
    ulp: float

    @property
    def bound(self) -> float:
        return self.floor if math.isnan(self.torch_error) else max(OF_TORCH * self.torch_error, self.floor)

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        if self.quantity == _COUNTER:
            return f"{self.quantity}: expected {self.exact:g}, got {self.got:g}"
        at = f" at {self.position}" if self.position else ""
        of_torch = f" (the larger of {self.floor:g} and {OF_TORCH:g} times torch's {_short(self.torch_error)})"
        allowed = f"{_short(self.bound)} ulp{'' if math.isnan(self.torch_error) else of_torch}"
        digits = 17 if self.ulp < 1e-12 * abs(self.exact) else 9
        values = f"got {self.got:.{digits}g}, exact {self.exact:.{digits}g}, an ulp is {self.ulp:.3g}"
        return f"{self.quantity}{at}: expected an error of at most {allowed}, got {_short(self.error)}: {values}"


def _short(ulps: float) -> str:
    return f"{ulps:.2f}" if ulps < 1e4 else f"{ulps:.3g}"


def floor_of(quantity: str, dtype: torch.dtype) -> float:
    """Return the ulp of `dtype` that a quantity may be off, however exact torch is.

    2 in half types, to which a right implementation rounds at the end. float32 and float64 are the types that it
    computes in, so each step rounds: 4, and 8 for gradients, which are made of xhat, itself the result of such steps.
    """
    if dtype in _HALF:
        return tolerance.ACCEPTED_ULPS
    return float(tolerance.ELEMENT_ROUNDINGS) if quantity.startswith("grad_") else tolerance.ACCEPTED_ULPS_FLOAT64


Subject = Callable[..., Any]
_COUNTER = "num_batches_tracked"
_QUANTITIES = ("output", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")


def assert_parity(
    subject: Subject,
    case: ParityCase,
    device: str | torch.device = "cpu",
    *,
    gradients: bool = True,
    counter: bool = True,
    beside_torch: bool = True,
) -> None:
    """Assert that a BatchNorm is within a few ulp of float64, or twice as far as torch's own, on one case.

    subject: a layer's class, or anything that makes one: subject(num_features, eps=, momentum=, affine=,
    track_running_stats=), of which only those are passed that differ from torch's defaults. Or a function with the
    signature of torch.nn.functional.batch_norm, known by its parameter `running_mean`; it is called with positional
    arguments. gradients: False for one that has no backward. counter: False for a layer with running statistics that
    has no num_batches_tracked. beside_torch: False leaves torch's error out of the bound, which torch itself then
    exceeds in some cases.

    Compared are the output, running_mean, running_var and, of a layer, num_batches_tracked, and the gradients of input,
    weight and bias. The input has to be left as it was. Where torch's output or gradient of a channels-last input is
    channels-last, it has to be so.

    Raises AssertionError, which names each quantity that fails with position, error and bound; TypeError for a subject
    that is neither; RuntimeError for a case of float64 where numpy.longdouble cannot measure it.
    """
    options = dict(gradients=gradients, counter=counter, beside_torch=beside_torch)
    deviations = compare(subject, case, device, **options)
    failed = [str(deviation) for deviation in deviations if not deviation.passed]
    _expect(not failed, "\n  ".join([f"{_name(subject)} on {case}, {device}:", *failed]))


def _expect(holds: bool, message: str) -> None:
    """Raise AssertionError where something does not hold; python -O removes assert statements."""
    if not holds:
        raise AssertionError(message)


def why_not_measurable(case: ParityCase) -> str | None:
    """Say why a case cannot be measured here, or None where it can: float64 needs a longer type."""
    return extended.why_unavailable() if case.dtype == torch.float64 else None


def compare(
    subject: Subject,
    case: ParityCase,
    device: str | torch.device = "cpu",
    *,
    gradients: bool = True,
    counter: bool = True,
    beside_torch: bool = True,
) -> Iterator[Deviation]:
    """Yield the largest deviation of each quantity, passed or not. Arguments and errors are those of assert_parity."""
    reason = why_not_measurable(case)
    if reason is not None:
        raise RuntimeError(f"assert_parity: cannot measure {case}: {reason}")
    data = _draw(case, device)
    results = _run(subject, case, data, gradients, counter)
    stock = _run(F.batch_norm, case, data, gradients)
    known, steepness = _exact(case, data), _steepness(case, data)
    for name in (name for name in _QUANTITIES if name in known):
        exact, scale = known[name]
        if name not in results:
            _expect(name.startswith("grad_") and not gradients, f"{name}: expected one, got none")
            continue
        if "channels_last" in case.layout and name in ("output", "grad_input"):
            _check_memory_format(name, results[name], stock[name])
        dtype = case.dtype if name in ("output", "grad_input") else case.vector_dtype
        ulp, floor = tolerance.ulp(dtype, scale).nan_to_num(nan=1.0).cpu(), floor_of(name, dtype)
        among = steepness if beside_torch else None
        yield _deviation(name, results[name].cpu(), stock[name].cpu(), exact, ulp, floor, among)
    if _COUNTER in results:
        got, expected = results[_COUNTER].item(), BATCHES_BEFORE + case.moves_statistics
        yield Deviation(_COUNTER, (), got, expected, abs(got - expected), 0.0, 0.0, 1.0)


def _name(subject: Subject) -> str:
    made = subject.func if isinstance(subject, functools.partial) else subject
    return str(getattr(made, "__qualname__", None) or made)


def _draw(case: ParityCase, device: str | torch.device) -> dict[str, Tensor]:
    channels, dtype = case.case.channels, case.vector_dtype
    vectors = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5)} if case.affine else {}
    if case.track_running_stats:
        vectors |= {"running_mean": (-0.5, 0.5), "running_var": (0.5, 1.5)}
    data = {
        name: cases.make_vector(channels, dtype, device, seed, low, high)
        for seed, (name, (low, high)) in enumerate(vectors.items(), 2)
    }
    data["input"] = cases.make_input(case.case, case.dtype, device)
    data["grad_out"] = cases.make_normal(case.case, case.dtype, device)
    return data


def _is_function(subject: Subject) -> bool:
    """Return whether a subject is a function like F.batch_norm, by its signature."""
    if isinstance(subject, type):
        return False
    try:
        return "running_mean" in inspect.signature(subject).parameters
    except (TypeError, ValueError):
        return False


def _make_layer(subject: Subject, case: ParityCase, data: dict[str, Tensor], counter: bool) -> Any:
    """Make a layer with the parameters and buffers of `data`, and with a counter where one is asked for."""
    defaults = {"eps": EPS, "momentum": MOMENTUM, "affine": True, "track_running_stats": True}
    options = {name: getattr(case, name) for name, value in defaults.items() if getattr(case, name) != value}
    expected = "assert_parity: expected what makes a layer, or a function with a parameter running_mean"
    if not callable(subject):
        raise TypeError(f"{expected}, got {subject!r}")
    made = subject(case.case.channels, **options)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{expected}, got {_name(subject)}, which returned a {type(made).__name__}")
    layer: Any = made.to(device=data["input"].device, dtype=case.vector_dtype).train(case.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            own = getattr(layer, name, None)
            _expect((own is None) == (name not in data), f"{name}: expected {data.get(name)}, got {own}")
            if own is not None:
                own.copy_(data[name])
        if getattr(layer, _COUNTER, None) is not None:
            layer.num_batches_tracked.fill_(BATCHES_BEFORE)
        elif case.track_running_stats:
            _expect(not counter, f"{_COUNTER}: expected one beside running statistics, unless counter=False, got none")
    return layer


def _run(
    subject: Subject, case: ParityCase, data: dict[str, Tensor], gradients: bool, counter: bool = True
) -> dict[str, Tensor]:
    """Return what a subject computes, by name."""
    x = data["input"]
    if subject is F.batch_norm and x.device.type == "cuda":
        x = x.clone(memory_format=torch.preserve_format)  # cuDNN reads unaligned tensors as if they were aligned
    x = x.detach().requires_grad_(gradients)
    before = x.detach().clone()
    leaves = {"input": x}
    if _is_function(subject):
        names = ("weight", "bias", "running_mean", "running_var")
        own = {name: data[name].clone() if name in data else None for name in names}
        for name in ("weight", "bias"):
            vector = own[name]
            if vector is not None:
                leaves[name] = vector.requires_grad_(gradients)
        momentum = 1 / (BATCHES_BEFORE + 1) if case.momentum is None else case.momentum
        vectors = (own["running_mean"], own["running_var"], own["weight"], own["bias"])
        output = subject(x, *vectors, case.uses_batch, momentum, case.eps)
        buffers = {name: own[name] for name in names[2:]}
    else:
        layer = _make_layer(subject, case, data, counter)
        output = layer(x)
        leaves |= {name: getattr(layer, name) for name in ("weight", "bias") if name in data}
        buffers = {name: getattr(layer, name, None) for name in ("running_mean", "running_var", _COUNTER)}
    result = {"output": output}
    _check_form("output", output, tuple(x.shape), case.dtype)
    if gradients:
        _expect(output.requires_grad, "output: expected one with a gradient, unless gradients=False, got none")
        grads = torch.autograd.grad(output, list(leaves.values()), data["grad_out"], allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            _expect(grad is not None, f"grad_{name}: expected a gradient, got none")
            result[f"grad_{name}"] = grad
    result |= {name: buffer for name, buffer in buffers.items() if buffer is not None}
    same = torch.equal(x.detach().nan_to_num(), before.nan_to_num())
    _expect(same, f"input: expected to be left as it was, got another from {_name(subject)}")
    return {name: value.detach() for name, value in result.items()}


def _check_form(name: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _expect(tuple(got.shape) == shape, f"{name}: expected shape {list(shape)}, got {list(got.shape)}")
    _expect(got.dtype == dtype, f"{name}: expected {dtype}, got {got.dtype}")


def _check_memory_format(name: str, got: Tensor, stock: Tensor) -> None:
    """Check that a result of a channels-last input is channels-last where torch's is."""
    expected = torch.channels_last if got.dim() == 4 else torch.channels_last_3d
    right = got.is_contiguous(memory_format=expected) or not stock.is_contiguous(memory_format=expected)
    _expect(right, f"{name}: expected {expected}, got strides {got.stride()}")


Exact = Tensor | extended.Array


def _exact(case: ParityCase, data: dict[str, Tensor]) -> dict[str, tuple[Exact, Tensor]]:
    """Return the exact quantities, each with the size per channel, [C], of the terms that it is made of.

    y = xhat * weight + bias with xhat = (x - mean) / sqrt(var + eps); running statistics move by the momentum, with the
    unbiased variance; grad_input = weight * inv_std * (g - mean(g) - xhat * mean(g * xhat)), of which only the first
    term is left with constant statistics; grad_weight = sum(g * xhat), grad_bias = sum(g).
    """
    x, g = data["input"].double(), data["grad_out"].double()
    dims, count = [d for d in range(x.dim()) if d != 1], case.case.count
    wide = (1, -1, *[1] * (x.dim() - 2))
    vectors = {name: data[name].double() for name in ("weight", "bias", "running_mean", "running_var") if name in data}
    ones, zeros = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    weight, bias = vectors.get("weight", ones), vectors.get("bias", zeros)
    mean, var = vectors.get("running_mean", zeros), vectors.get("running_var", ones)
    deviation = x - mean.view(wide)
    if case.uses_batch and count:
        mean = x.mean(dims)
        deviation = x - mean.view(wide)
        rest = deviation.mean(dims)  # of the rounding of the mean
        mean, deviation = mean + rest, deviation - rest.view(wide)
        var = deviation.square().mean(dims)
    inv_std = 1 / (var + case.eps).sqrt()
    xhat, slope = deviation * inv_std.view(wide), weight * inv_std
    exact = {"output": xhat * weight.view(wide) + bias.view(wide)}
    exact |= {"grad_weight": (g * xhat).sum(dims), "grad_bias": g.sum(dims)}
    grad = g
    if case.uses_batch and count:
        means = [exact[name] / count for name in ("grad_bias", "grad_weight")]
        grad = g - means[0].view(wide) - xhat * means[1].view(wide)
    exact["grad_input"] = grad * slope.view(wide)
    scale = {
        "output": _largest(xhat * weight.view(wide)) + bias.abs(),
        "grad_input": _largest(g * slope.view(wide)),
        "grad_weight": (g * xhat).square().sum(dims).sqrt(),
        "grad_bias": g.square().sum(dims).sqrt(),
    }
    if case.track_running_stats:
        factor = 0.0
        if case.moves_statistics and count:
            factor = 1 / (BATCHES_BEFORE + 1) if case.momentum is None else case.momentum
        unbiased = var * count / max(count - 1, 1)
        for name, batch, size in (("running_mean", mean, mean.abs() + var.sqrt()), ("running_var", unbiased, unbiased)):
            before = data[name].double()
            exact[name] = (1 - factor) * before + factor * batch if factor else before
            scale[name] = (1 - factor) * before.abs() + (factor * size if factor else 0)
    if not case.affine:
        del exact["grad_weight"], exact["grad_bias"]
    if case.dtype == torch.float64 and count:
        return {name: (value, scale[name]) for name, value in _in_longdouble(case, data, exact).items()}
    return {name: (value, scale[name]) for name, value in exact.items()}


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitude per channel; 0 where there is none."""
    rows = x.abs().transpose(0, 1).flatten(1)
    return rows.amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def _in_longdouble(case: ParityCase, data: dict[str, Tensor], names: Iterable[str]) -> dict[str, Exact]:
    """Return the quantities `names` in numpy.longdouble, for float64."""
    with extended.quiet():  # of inf and NaN in the data
        return _of_wide(case, {name: extended.wide(value) for name, value in data.items()}, names)


def _of_wide(case: ParityCase, wide: dict[str, extended.Array], names: Iterable[str]) -> dict[str, Exact]:
    x, grad_out = wide["input"], wide["grad_out"]
    weight = wide.get("weight", extended.wide(torch.ones(x.shape[1])))
    bias = wide.get("bias", extended.wide(torch.zeros(x.shape[1])))
    if case.uses_batch:
        deviation, (mean, var) = extended.deviations(x), extended.statistics(x)
    else:
        mean, var = wide["running_mean"], wide["running_var"]
        deviation = extended.deviations(x, mean)
    inv_std = extended.inverse_std(var, case.eps)
    gradients = extended.gradients(grad_out, deviation, weight, inv_std, case.uses_batch)
    found: dict[str, Exact] = {"output": extended.normalize(deviation, weight, bias, inv_std)}
    found |= dict(zip(("grad_input", "grad_weight", "grad_bias"), gradients, strict=True))
    for name, batch in (("running_mean", mean), ("running_var", var * case.case.count / max(case.case.count - 1, 1))):
        if case.moves_statistics:
            factor = 1 / (BATCHES_BEFORE + 1) if case.momentum is None else case.momentum
            found[name] = extended.running(wide[name], batch, factor)
        elif name in wide:
            found[name] = wide[name]
    return {name: found[name] for name in names}


def _steepness(case: ParityCase, data: dict[str, Tensor]) -> Tensor:
    """Return |mean| / sqrt(var + eps) of each channel, [C], by which rounding the mean is amplified; 0 for constant
    statistics, which nobody computes.
    """
    x = data["input"].double().cpu().transpose(0, 1).flatten(1)
    if not case.uses_batch or not x.numel():
        return x.new_zeros(x.shape[0])
    var, mean = torch.var_mean(x, 1, correction=0)
    return (mean.abs() / (var + case.eps).sqrt()).nan_to_num(nan=math.inf)


def _deviation(
    name: str, got: Tensor, stock: Tensor, exact: Exact, ulp: Tensor, floor: float, steepness: Tensor | None
) -> Deviation:
    """Return the deviation of a quantity that exceeds its bound the most. `ulp` and `steepness` are per channel;
    without the latter torch's error does not count.
    """
    dtype = stock.dtype
    _check_form(name, got, tuple(exact.shape), dtype)
    if got.numel() == 0:
        return Deviation(name, (), math.nan, math.nan, 0.0, 0.0, floor, math.nan)
    wide = (1, -1, *[1] * (got.dim() - 2)) if got.dim() > 1 else (-1,)
    unit = ulp.view(wide).expand(got.shape)
    value = exact.double().cpu() if isinstance(exact, Tensor) else torch.from_numpy(exact.astype("float64"))
    rounded = value.to(dtype)
    error, of_stock = (_error(each, exact, rounded, unit) for each in (got, stock))
    # Which of inf and NaN it is may be left open by the formula, as torch shows: its own result is another.
    error = error.masked_fill(~rounded.isfinite() & of_stock.isinf(), 0.0)
    of_torch = torch.full_like(error, math.nan)
    if steepness is not None:
        # In a channel where torch is off by as much as the terms themselves, its error is no measure for others. Its
        # own values are let pass.
        of_channel = of_stock if got.dim() == 1 else _largest(of_stock)
        absurd = of_channel > 1 / torch.finfo(dtype).eps
        error = error.masked_fill(absurd.view(wide) & _same(got, stock), 0.0)
        of_torch = _up_to(AS_STEEP * steepness, steepness, of_channel.masked_fill(absurd, 0.0)).view(wide)
        of_torch = of_torch.expand(got.shape)
    at = int((error / (OF_TORCH * of_torch).nan_to_num().clamp(min=floor)).argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))
    here = [t.flatten()[at].item() for t in (got.double(), value, error, of_torch, unit)]
    return Deviation(name, position, here[0], here[1], here[2], here[3], floor, here[4])


def _up_to(limits: Tensor, steepness: Tensor, errors: Tensor) -> Tensor:
    """Return, for each limit, the largest of the errors of the channels that are at most so steep."""
    rising, order = steepness.sort()
    return errors[order].cummax(0).values[torch.searchsorted(rising, limits, right=True) - 1]


def _error(got: Tensor, exact: Exact, rounded: Tensor, unit: Tensor) -> Tensor:
    """Return the error of each element in ulp; infinite where `rounded`, the exact value in the quantity's dtype, or
    the element is inf or NaN and the other is not the same.
    """
    if isinstance(exact, Tensor):
        error = (got.double() - exact.cpu()).abs()
    else:
        with extended.quiet():  # of inf and NaN
            error = torch.from_numpy(abs(extended.wide(got) - exact).astype("float64"))
    error = (error / unit).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(rounded.isfinite() & got.isfinite(), error, torch.where(_same(got, rounded), 0.0, math.inf))


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors have the same number, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan())
