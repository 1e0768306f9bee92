"""One op on one shape, timed in seconds: fastbn beside torch and what else is at hand, and each beside a copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastbn import Plan, __version__, explain
from fastbn.measure.copies import time_copy
from fastbn.measure.gate import admit
from fastbn.measure.implementations import FASTBN, STOCK, Implementation
from fastbn.measure.inputs import Inputs, make_inputs
from fastbn.measure.machine import cpu_name
from fastbn.measure.timer import Budget, Times, clock_of, speedup_and_spread, summarize, time_in_turns
from fastbn.measure.workload import Workload, dtype_name

FORMAT = "fastbn bench shape 1"
# Fewer rounds than the suites have, whose figures are kept: a large shape is to take seconds, too.
MIN_ROUNDS = 3
# The copy has its own rounds, for this fraction of the seconds.
COPY_FRACTION = 0.3


@dataclass(frozen=True)
class Timing:
    """The times of one implementation, in microseconds per call.

    gb_per_s: the bytes that the op has to move over the median, in 1e9 bytes per second. copy_share: its fraction of
    what a copy reached. speedup, speedup_p20, speedup_p80: torch's time over this one's, the median and percentiles
    over the rounds; None where torch was not timed.
    """

    implementation: str
    kernel: str
    times: Times
    gb_per_s: float
    copy_share: float
    speedup: float | None
    speedup_p20: float | None
    speedup_p80: float | None


@dataclass(frozen=True)
class Refused:
    """An implementation that was not timed, and why: wrong results, an error, or that it does not take the call."""

    implementation: str
    wrong: bool
    reason: str


@dataclass(frozen=True)
class OneShape:
    """The result. copy_gb_per_s: what a copy of a tensor as large as the input reached, read and written."""

    workload: Workload
    machine: dict[str, Any]
    copy_gb_per_s: float
    timings: tuple[Timing, ...]
    refused: tuple[Refused, ...]
    plans: dict[str, Plan]

    @property
    def floor_bytes(self) -> int:
        case = self.workload.case
        return self.workload.operation.floor_bytes(case.numel, self.workload.dtype.itemsize)

    @property
    def fastbn_failed(self) -> bool:
        """Whether fastbn, or one of its backends, gave a wrong result or could not run."""
        return any(each.implementation.startswith(FASTBN) for each in self.refused)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as a dict that json can write."""
        workload = self.workload
        return {
            "format": FORMAT,
            "machine": self.machine,
            "shape": list(workload.case.shape),
            "dtype": dtype_name(workload.dtype),
            "layout": workload.case.layout,
            "op": str(workload.operation),
            "tensor_bytes": workload.tensor_bytes,
            "floor_bytes": self.floor_bytes,
            "copy_gb_per_s": self.copy_gb_per_s,
            "plans": {direction: dataclasses.asdict(plan) for direction, plan in self.plans.items()},
            "timings": [_flat(timing) for timing in self.timings],
            "refused": [dataclasses.asdict(refused) for refused in self.refused],
        }


def measure_shape(
    workload: Workload, device: torch.device, rivals: Sequence[Implementation], seconds: float
) -> OneShape:
    """Check the implementations against float64, and time those that pass in turns, for `seconds` each.

    Raises what torch raises where there is not the memory for it.
    """
    budget, clock = Budget(seconds, warm_up_seconds=min(0.1, seconds), min_rounds=MIN_ROUNDS), clock_of(device)
    inputs = make_inputs(workload.case, workload.dtype, device)
    admitted, refused = {}, []
    for each in admit(rivals, workload, inputs):
        if each.prepared is None:
            refused.append(Refused(each.name, each.wrong, each.reason))
        else:
            admitted[each.name] = each.prepared
    copy_us = time_copy(
        workload.tensor_bytes, device, clock, dataclasses.replace(budget, seconds=COPY_FRACTION * seconds)
    )
    copy_gb_per_s = 2 * workload.tensor_bytes / copy_us / 1e3
    samples = time_in_turns([each.call for each in admitted.values()], clock, budget) if admitted else []
    by_name = dict(zip(admitted, samples, strict=True))
    floor_bytes = workload.operation.floor_bytes(workload.case.numel, workload.dtype.itemsize)
    timings = []
    for name, own in by_name.items():
        times = summarize(own)
        gb_per_s = floor_bytes / times.median_us / 1e3
        compared = name != STOCK and STOCK in by_name
        ratios = speedup_and_spread(own, by_name[STOCK]) if compared else (None, None, None)
        timings.append(Timing(name, admitted[name].kernel, times, gb_per_s, gb_per_s / copy_gb_per_s, *ratios))
    plans = _plans(workload, inputs)
    return OneShape(workload, _machine(device), copy_gb_per_s, tuple(timings), tuple(refused), plans)


def _flat(timing: Timing) -> dict[str, Any]:
    fields = dataclasses.asdict(timing)
    return (
        {"implementation": fields.pop("implementation"), "kernel": fields.pop("kernel")} | fields.pop("times") | fields
    )


def _plans(workload: Workload, inputs: Inputs) -> dict[str, Plan]:
    operation = workload.operation
    return {
        direction: explain(
            inputs.input,
            direction,
            activation=operation.activation,
            residual=operation.residual,
            training=operation.training,
        )
        for direction in ("forward", "backward")[: 1 + operation.backward]
    }


def _machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "fastbn": __version__,
    }
