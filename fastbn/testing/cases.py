"""The table of cases that every test and benchmark uses, and the tensors of a case.

A case is a shape, a layout and a kind of data. `setups` crosses cases with the options of the ops so that each
activation meets each dtype, memory format and residual.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass

import torch

from fastbn.ops.activations import ACTIVATIONS

LAYOUTS = (
    "contiguous",
    "channels_last",
    "channels_last_3d",
    "sliced",
    "sliced_channels_last",
    "transposed",
    "expanded",
    "unaligned",
    "unaligned_channels_last",
)
DATA = ("normal", "offset", "constant", "inf", "nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Most are exact in no binary format. With the last two, a rounded mean or a scale-and-shift would lose all digits.
CONSTANTS = (0.1, 0.0, -3.3, 1e4, 12345.678, -5e4, 1e7, 1e30)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    data: str = "normal"
    large: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def memory_format(self) -> str:
        """Return the memory format that the ops give the output; channels_last stands for channels_last_3d too."""
        return "channels_last" if "channels_last" in self.layout else "contiguous"

    @property
    def count(self) -> int:
        """Return the number of elements per channel."""
        return self.numel // self.channels


def make_case(kind: str, *shape: int, layout: str = "contiguous", data: str = "normal", large: bool = False) -> Case:
    parts = [kind, "x".join(map(str, shape))]
    parts += [part for part, default in ((layout, "contiguous"), (data, "normal")) if part != default]
    return Case("-".join(parts), shape, layout, data, large)


CASES = (
    make_case("prime", 7, 13),
    make_case("prime", 5, 11, 17),
    make_case("prime", 3, 7, 11, 13),
    make_case("prime", 2, 5, 3, 7, 11),
    make_case("prime", 3, 7, 11, 13, layout="channels_last"),
    make_case("prime", 2, 5, 3, 7, 11, layout="channels_last_3d"),
    make_case("one_channel", 37, 1),
    make_case("one_channel", 4, 1, 9, 9),
    make_case("one_channel", 4, 1, 9, 9, layout="channels_last"),
    make_case("rgb", 4, 3, 16, 16),
    make_case("rgb", 4, 3, 16, 16, layout="channels_last"),
    make_case("wide", 2, 129, 3, 3),
    make_case("wide", 2, 129, 3, 3, layout="channels_last"),
    make_case("wide", 17, 129),
    make_case("aligned", 4, 32, 4, 8),
    make_case("aligned", 4, 32, 4, 8, layout="channels_last"),
    make_case("aligned", 2, 16, 2, 4, 8, layout="channels_last_3d"),
    make_case("pointwise", 6, 20, 1, 1),
    make_case("pointwise", 6, 20, 1, 1, layout="channels_last"),
    make_case("two_values", 2, 5),
    make_case("two_values", 1, 5, 1, 2),
    make_case("two_values", 1, 5, 1, 2, layout="channels_last"),
    make_case("three_values", 3, 24),
    make_case("three_values", 1, 24, 3),
    make_case("one_value", 1, 6, 1, 1),
    make_case("empty", 0, 4),
    make_case("empty", 0, 3, 5, 5),
    make_case("empty", 2, 3, 0, 5, layout="channels_last"),
    make_case("unaligned", 3, 8, 5, 5, layout="unaligned"),
    make_case("unaligned", 3, 8, 5, 5, layout="unaligned_channels_last"),
    make_case("unaligned", 33, 10, layout="unaligned"),
    make_case("strided", 3, 6, 5, 4, layout="sliced"),
    make_case("strided", 3, 6, 5, 4, layout="sliced_channels_last"),
    make_case("strided", 3, 6, 5, 4, layout="transposed"),
    make_case("strided", 12, 9, layout="transposed"),
    make_case("strided", 4, 6, 5, layout="sliced"),
    make_case("strided", 4, 3, 5, 3, layout="expanded"),
    make_case("steep", 4, 7, 9, 9, data="offset"),
    make_case("steep", 4, 7, 9, 9, layout="channels_last", data="offset"),
    make_case("steep", 64, 33, data="offset"),
    make_case("flat", 3, 8, 5, 5, data="constant"),
    make_case("flat", 3, 8, 5, 5, layout="channels_last", data="constant"),
    make_case("flat", 19, 8, data="constant"),
    make_case("infinite", 3, 5, 4, 4, data="inf"),
    make_case("infinite", 3, 5, 4, 4, layout="channels_last", data="inf"),
    make_case("not_a_number", 3, 5, 4, 4, data="nan"),
    make_case("not_a_number", 3, 5, 4, 4, layout="channels_last", data="nan"),
    make_case("long_row", 2, 2, 1021),
    make_case("many_rows", 1031, 3),
    # The cases below are too large for the emulator.
    make_case("many_rows", 65537, 2),
    make_case("many_rows", 70001, 1, 1, 1),
    make_case("many_rows", 66000, 2, 1, 2, layout="channels_last"),
    make_case("long_row", 1, 2, 65537),
    make_case("resnet", 8, 64, 28, 28),
    make_case("resnet", 8, 64, 28, 28, layout="channels_last"),
    make_case("resnet", 16, 256, 7, 7, layout="channels_last"),
    make_case("video", 2, 24, 4, 14, 14, layout="channels_last_3d"),
    make_case("mlp", 512, 300),
    make_case("panels", 2, 8201),
    make_case("panels", 2, 8201, 2, 3, layout="channels_last"),
    make_case("steep", 4, 16, 40, 40, data="offset"),
    make_case("steep", 4, 16, 40, 40, layout="channels_last", data="offset"),
    make_case("beyond_int32", 3, 2, 2**15, 11003, large=True),
    make_case("beyond_int32", 3, 2, 2**15, 11003, layout="channels_last", large=True),
)
LARGE = tuple(case for case in CASES if case.large)
ORDINARY = tuple(case for case in CASES if not case.large)
SMALL_NUMEL = 4096
SMALL = tuple(case for case in ORDINARY if case.numel <= SMALL_NUMEL)
# The layouts that kernels see: the bindings make the others dense.
SMALL_DENSE = tuple(
    case for case in SMALL if case.layout not in ("sliced", "sliced_channels_last", "transposed", "expanded")
)


@functools.lru_cache(maxsize=16)
def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return standard normal values, float64. They are cached: do not write to them."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _values(case: Case, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return contiguous values of the kind of data of `case`, in `dtype`, on the CPU."""
    per_channel = (1, case.channels, *[1] * (len(case.shape) - 2))
    if case.data == "constant":
        limit = 0.9 * torch.finfo(dtype).max
        constants = torch.tensor([CONSTANTS[c % len(CONSTANTS)] for c in range(case.channels)], dtype=torch.float64)
        return constants.clamp(-limit, limit).to(dtype).view(per_channel).expand(case.shape).contiguous()
    x = _normal(case.shape, seed)
    if case.data == "offset":
        return (x * 1e-2 + 1e4).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    std = torch.rand(per_channel, dtype=torch.float64, generator=generator) + 0.5
    mean = torch.rand(per_channel, dtype=torch.float64, generator=generator) * 2 - 1
    x = x * std + mean
    if case.data == "inf":
        x[0, 0, ..., -1] = math.inf
        x[-1, -1, ..., 0] = -math.inf
    if case.data == "nan":
        x[0, 0, ..., -1] = math.nan
    return x.to(dtype)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the values of contiguous `x` in a layout of `LAYOUTS`."""
    if layout in ("channels_last", "channels_last_3d"):
        # Tensor.contiguous would leave tensors of one channel or one pixel alone, which are channels_last as they are.
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]
    if layout == "sliced_channels_last":
        return torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout.startswith("unaligned"):
        last = layout.endswith("channels_last")
        dense = x.movedim(1, -1).contiguous() if last else x
        storage = x.new_empty(x.numel() + 1)
        storage[1:] = dense.flatten()
        shifted = storage[1:].view(dense.shape)
        return shifted.movedim(-1, 1) if last else shifted
    return x


def make_input(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> torch.Tensor:
    """Make the input of a case: its shape, layout and data, the same for every device and run."""
    if case.large:
        return make_on_device(case, dtype, device, seed)
    return lay_out(_values(case, dtype, seed).to(device), case.layout)


def make_normal(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> torch.Tensor:
    """Make standard normal values of the case's shape and layout, for its residual or its grad_out."""
    if case.large:
        return make_on_device(case, dtype, device, seed)
    return lay_out(_normal(case.shape, seed).to(device, dtype, copy=True), case.layout)


def make_on_device(case: Case, dtype: torch.dtype, device: str | torch.device, seed: int) -> torch.Tensor:
    """Make standard normal values of a dense case on the device and in place: it may fill half of a GPU's memory."""
    generator = torch.Generator(device).manual_seed(seed)
    memory_format = torch.contiguous_format if case.layout == "contiguous" else getattr(torch, case.layout)
    x = torch.empty(case.shape, dtype=dtype, device=device, memory_format=memory_format)
    return x.normal_(generator=generator)


def make_vector(
    channels: int, dtype: torch.dtype, device: str | torch.device, seed: int, low: float, high: float
) -> torch.Tensor:
    """Make uniform values in [low, high): a weight, bias or running statistic of shape [channels]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(channels, dtype=torch.float64, generator=generator) * (high - low) + low
    return values.to(dtype).to(device)


@dataclass(frozen=True)
class Setup:
    """A case with the options of an op. `affine` is both, weight, bias or neither; `momentum` is BatchNorm's."""

    case: Case
    dtype: torch.dtype
    param_dtype: torch.dtype
    activation: int
    residual: bool
    affine: str
    momentum: float | None

    def __str__(self) -> str:
        name = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
        dtype, param = (name[str(d).removeprefix("torch.")] for d in (self.dtype, self.param_dtype))
        options = [ACTIVATIONS[self.activation], "add"] if self.residual else [ACTIVATIONS[self.activation]]
        return "-".join([self.case.name, dtype, f"p{param}", *options, self.affine, f"m{self.momentum}"])


def setups(cases: tuple[Case, ...] = ORDINARY) -> list[Setup]:
    """Cross activations, dtypes, memory formats and residuals, and every case with every dtype; other options take
    turns.
    """
    rng = random.Random(20)
    chosen = []
    for memory_format in ("contiguous", "channels_last"):
        # The larger cases are added once per dtype, below. The pool is cycled, so that each case has its turn.
        pool = [case for case in cases if case.memory_format == memory_format and case.numel <= SMALL_NUMEL]
        walk = itertools.cycle(rng.sample(pool, len(pool)))
        for activation, dtype, residual in itertools.product(range(len(ACTIVATIONS)), DTYPES, (False, True)):
            chosen.append((next(walk), dtype, activation, residual))
    seen = {(case, dtype) for case, dtype, _, _ in chosen}
    for case, dtype in itertools.product(cases, DTYPES):
        if (case, dtype) not in seen:
            chosen.append((case, dtype, rng.randrange(len(ACTIVATIONS)), rng.random() < 0.5))
    result = []
    for number, (case, dtype, activation, residual) in enumerate(chosen):
        half = dtype in (torch.bfloat16, torch.float16)
        param_dtype = torch.float32 if half and rng.random() < 0.5 else dtype
        affine = ("both", "both", "weight", "bias", "neither")[number % 5]
        momentum = (0.1, None, 0.3, 0.0, -0.5, 1.0, 0.01)[number % 7]
        result.append(Setup(case, dtype, param_dtype, activation, residual, affine, momentum))
    return result
