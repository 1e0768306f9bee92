"""A drawn call of batch norm, by value: its repr is enough to make its tensors again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

OPERANDS = ("input", "residual", "weight", "bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _ShortRepr:
    """A mixin whose repr leaves out fields at their defaults, to which hypothesis shrinks."""

    def __repr__(self) -> str:
        changed = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True, repr=False)
class Layout(_ShortRepr):
    """The strides of a tensor.

    order: dimensions from the outermost in memory; steps: distance of neighbours in each dimension; expanded:
    dimensions of stride 0; offset: elements before the first; unit_stride: stride of dimensions of size 1.
    """

    order: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    expanded: tuple[int, ...] = ()
    offset: int = 0
    unit_stride: int | None = None

    @property
    def name(self) -> str:
        if self.expanded:
            return "expanded"
        if self.unit_stride is not None:
            return "odd unit strides"
        if any(step != 1 for step in self.steps):
            return "sliced"
        dense = "contiguous"
        if self.order:
            dense = "channels_last" if self.order == channels_last(len(self.order)).order else "permuted"
        return f"unaligned {dense}" if self.offset else dense


def channels_last(dim: int) -> Layout:
    return Layout(order=(0, *range(2, dim), 1))


@dataclass(frozen=True, repr=False)
class Case(_ShortRepr):
    """A call. Data are names of `_DATA` and `_VECTORS`; None is an absent tensor. `oddity` is one unusual property."""

    shape: tuple[int, ...] = (2, 1)
    dtype: str = "float32"
    layout: Layout = Layout()
    data: tuple[str, ...] = ("normal",)  # the channels take turns
    seed: int = 0
    param_dtype: str | None = None  # None: the input's
    weight: str | None = None
    bias: str | None = None
    running: str | None = None
    counter: bool = False
    activation: str | None = None
    activation_param: float | None = None
    residual: str | None = None
    residual_layout: Layout = Layout()
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    requires: tuple[str, ...] = ()
    grad_out: str = "normal"
    grad_layout: Layout = Layout()
    hook: str | None = None
    threads: tuple[int, int] = (1, 1)
    api: str = "functional"
    backend: str | None = None
    backward: str = "once"
    grad_mode: str = "grad"
    oddity: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 3

    def code(self) -> str:
        return f"from tests.fuzz.case import Case, Layout\nfrom tests.fuzz.check import check\ncheck({self!r})"


def _per_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else ()


def _plain(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return normal values; each channel has its own mean and standard deviation."""
    per_channel = _per_channel(shape)
    x = rng.standard_normal(shape) * rng.uniform(0.5, 1.5, per_channel) + rng.uniform(-1, 1, per_channel)
    return np.asarray(x)


def _with(value: float, other: float):
    def data(rng, shape, info):
        x = _plain(rng, shape)
        if x.size:
            flat = x.reshape(-1)
            flat[rng.integers(x.size)] = other
            flat[rng.integers(x.size)] = value
        return x

    return data


def _constant(rng, shape, info):
    constants = rng.choice([0.1, -3.3, 1e4, 12345.678, 1e7, 1e30], _per_channel(shape))
    return np.broadcast_to(np.clip(constants, -0.9 * info.max, 0.9 * info.max), shape).copy()


def _wide_range(rng, shape, info):
    decades = min(np.log10(info.max) - 1, 8)
    return np.sign(rng.standard_normal(shape)) * 10 ** rng.uniform(-decades, decades, shape)


_DATA = {
    "normal": lambda rng, shape, info: _plain(rng, shape),
    "integers": lambda rng, shape, info: rng.integers(-4, 5, shape).astype(np.float64),
    "ones": lambda rng, shape, info: np.ones(shape),
    "zeros": lambda rng, shape, info: np.where(rng.random(shape) < 0.5, 0.0, -0.0),
    "constant": _constant,
    "offset": lambda rng, shape, info: rng.standard_normal(shape) * 1e-2 + 1e4,
    "wide": _wide_range,
    "outlier": _with(1e4, 0.0),
    "inf": _with(np.inf, np.inf),
    "infs": _with(np.inf, -np.inf),
    "nan": _with(np.nan, np.nan),
    "large": lambda rng, shape, info: rng.standard_normal(shape) * info.max**0.5,
    "huge": lambda rng, shape, info: np.clip(rng.standard_normal(shape) / 4, -0.9, 0.9) * info.max,
    "small": lambda rng, shape, info: rng.standard_normal(shape) * 1e-3 * info.tiny**0.5,
    "tiny": lambda rng, shape, info: rng.standard_normal(shape) * info.tiny * 1e3,
    "subnormal": lambda rng, shape, info: rng.standard_normal(shape) * info.tiny / 8,
}
# There are no infinite weights or running statistics: scale and shift are computed once per channel, which makes the
# output NaN where torch's is infinite.
_VECTORS = {
    "uniform": lambda rng, n, info: rng.uniform(0.5, 1.5, n),
    "ones": lambda rng, n, info: np.ones(n),
    "signed": lambda rng, n, info: rng.uniform(-2, 2, n),
    "zeros": lambda rng, n, info: np.zeros(n),
    "large": lambda rng, n, info: rng.standard_normal(n) * info.max**0.5,
    "small": lambda rng, n, info: rng.standard_normal(n) * info.tiny**0.5,
    "nan": lambda rng, n, info: np.where(np.arange(n) % 2 == 0, np.nan, 1.0),
}
# Running mean and variance relative to the data's own: mean + a std, b var; or two constants.
RUNNING = ("near", "initial", "zero variance", "negative variance", "large variance", "far mean", "nan")
DATA, VECTORS = tuple(_DATA), tuple(_VECTORS)


def with_layout(values: Tensor, layout: Layout) -> Tensor:
    """Return the values with those strides; elements between and before them are NaN."""
    shape = values.shape
    order = layout.order or range(values.dim())
    steps = layout.steps or (1,) * values.dim()
    strides, extent = [0] * values.dim(), 1
    for d in reversed(order):
        if d not in layout.expanded:
            strides[d] = extent * steps[d]
            extent *= max(values.size(d), 1) * steps[d]
    storage = torch.empty(layout.offset + extent, dtype=values.dtype)
    storage.fill_(torch.nan if values.dtype.is_floating_point else 77)
    for d in layout.expanded:
        values = values[(slice(None),) * d + (slice(0, 1),)]
    storage.as_strided(values.shape, strides, layout.offset).copy_(values)
    if layout.unit_stride is not None:
        strides = [layout.unit_stride if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return storage.as_strided(shape, strides, layout.offset)


def _limits(dtype: torch.dtype) -> SimpleNamespace:
    """Return the largest and the smallest normal number; for float64, those whose squares are finite and normal.

    Beyond those, variances are not representable: float64 has no wider type to be summed in.
    """
    info = torch.finfo(dtype if dtype.is_floating_point else torch.float32)
    return SimpleNamespace(max=min(info.max, 1e150), tiny=max(info.tiny, 1e-150))


class Values:
    """The values of a case's tensors, contiguous and in their dtypes; `tensors` makes them in their layouts."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        dtype = case.torch_dtype
        self.input = self._elements(rng, case.data, case.shape)
        self.residual = None if case.residual is None else self._elements(rng, (case.residual,), case.shape)
        if case.oddity == "residual shape" and self.residual is not None:
            self.residual = torch.zeros(*case.shape, 2, dtype=dtype)
        if case.oddity == "residual dtype" and self.residual is not None:
            self.residual = self.residual.to(torch.float64 if dtype != torch.float64 else torch.float32)
        self.grad_out = self._elements(rng, (case.grad_out,), case.shape)
        self.param_dtype = dtype if case.param_dtype is None else getattr(torch, case.param_dtype)
        self.weight = self._vector(rng, "weight", case.weight)
        self.bias = self._vector(rng, "bias", case.bias)
        self.running_mean, self.running_var = self._running(rng)
        self.num_batches_tracked = torch.tensor(2) if case.counter else None
        if case.counter and case.oddity == "float counter":
            self.num_batches_tracked = torch.tensor(2.0)

    def _elements(self, rng, kinds: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        info = _limits(self.case.torch_dtype)
        parts = [_DATA[kind](rng, shape, info) for kind in kinds]
        x = parts[0]
        if len(shape) > 1:
            for i, part in enumerate(parts[1:], 1):
                x[:, i :: len(parts)] = part[:, i :: len(parts)]
        return torch.from_numpy(np.asarray(x)).to(self.case.torch_dtype)

    def _vector(self, rng, name: str, kind: str | None) -> Tensor | None:
        if kind is None:
            return None
        n = self.case.channels + (self.case.oddity == f"{name} size")
        dtype = self.param_dtype
        if self.case.oddity == "bias dtype" and name == "bias":
            dtype = torch.bfloat16 if dtype != torch.bfloat16 else torch.float32
        return torch.from_numpy(_VECTORS[kind](rng, n, _limits(dtype))).to(dtype)

    def _running(self, rng) -> tuple[Tensor | None, Tensor | None]:
        case = self.case
        if case.running is None:
            return None, None
        n = case.channels
        mean, var = np.zeros(n), np.ones(n)
        if case.running == "near" and self.input.dim() > 1 and self.input.numel() and not self.input.is_complex():
            flat = self.input.double().numpy()
            flat = np.moveaxis(flat, 1, 0).reshape(n, -1)
            with np.errstate(all="ignore"):
                data_mean, data_var = flat.mean(1), flat.var(1)
            good = np.isfinite(data_var) & (data_var > 0)
            mean = np.where(good, data_mean + 0.1 * np.sqrt(np.where(good, data_var, 1)), 0.5)
            var = np.where(good, data_var, 1.0) * rng.uniform(0.5, 1.5, n)
        odd = np.arange(n) % 2 == 0
        match case.running:
            case "zero variance":
                var = np.where(odd, 0.0, var)
            case "negative variance":
                var = np.where(odd, -1.0, var)
            case "large variance":
                var = np.where(odd, _limits(self.param_dtype).max / 4, var)
            case "far mean":
                mean = np.where(odd, 1e4, mean)
            case "nan":
                mean = np.where(odd, np.nan, mean)
        results = []
        for name, vector in (("running_mean", mean), ("running_var", var)):
            if case.oddity == f"no {name}":
                results.append(None)
                continue
            extra = case.oddity == f"{name} size"
            results.append(torch.from_numpy(np.append(vector, [1.0] * extra)).to(self.param_dtype))
        return results[0], results[1]

    def tensors(self) -> SimpleNamespace:
        """Make new tensors in their layouts, with requires_grad as the case says."""
        case = self.case
        layouts = {"input": case.layout, "residual": case.residual_layout, "grad_out": case.grad_layout}
        made = {}
        for name in (*OPERANDS, *BUFFERS, "grad_out"):
            values = getattr(self, name)
            if values is None:
                made[name] = None
                continue
            layout = layouts.get(name, Layout())
            if values.dim() == 1 and name not in layouts and case.oddity == f"strided {name}":
                layout = Layout(steps=(2,))
            if values.shape != case.shape and name in layouts:
                layout = Layout()
            made[name] = with_layout(values, layout)
            if name in case.requires and (values.is_floating_point() or values.is_complex()):
                made[name].requires_grad_()
        if case.oddity == "running_mean requires grad" and made["running_mean"] is not None:
            made["running_mean"].requires_grad_()
        return SimpleNamespace(**made)
