"""Runs the steps of a benchmark one after the other, and appends records to a Results.

A step is a workload by all its implementations, so an interrupt loses one step, never the comparison within one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from bench import calls
from bench.bandwidth import measure_copies
from bench.network import measure
from bench.network_cases import NetworkCase
from bench.network_models import COMPILED, Models
from bench.results import Call, Measurement, Refusal, Results
from fastbn.measure.gate import admit
from fastbn.measure.implementations import Implementation, Prepared
from fastbn.measure.inputs import Inputs, make_inputs
from fastbn.measure.timer import Budget, IdleClock, clock_of, speedup, summarize, time_in_turns
from fastbn.measure.workload import Workload, dtype_name

COMPILE_SECONDS = 8.0
# Those of a network, which has a hundred layers.
NETWORK_COMPILE_SECONDS = 60.0


@dataclass(frozen=True)
class Step:
    """A step. `seconds` is a guess, which the progress bar corrects."""

    name: str
    seconds: float
    run: Callable[[], None]


class Runner:
    """A runner on one device, which appends to `results`. `rivals` are all implementations that may take part."""

    def __init__(self, device: torch.device, rivals: Iterable[Implementation], budget: Budget, results: Results):
        self.device, self.rivals, self.budget, self.results = device, tuple(rivals), budget, results
        self._clock = clock_of(device)
        self._inputs: Inputs | None = None
        self._models: Models | None = None

    def copies(self) -> Step:
        def run() -> None:
            self.results.copy += measure_copies(self.device, self._clock, self.budget)

        return Step("copy", 6.0, run)

    def layer(self, workload: Workload) -> Step:
        """Return a step that measures device time of all implementations that take the workload and pass the gate."""

        def run() -> None:
            prepared = self._prepare(workload)
            if not prepared:
                return
            samples = time_in_turns([each.call for each in prepared.values()], self._clock, self.budget)
            self._append_measurements(workload, prepared, dict(zip(prepared, samples)))

        return Step(str(workload), self._guess(workload), run)

    def call(self, workload: Workload) -> Step:
        """Return a step that measures the other costs of a call of every such implementation."""

        def run() -> None:
            prepared = self._prepare(workload)
            if not prepared:
                return
            clock = IdleClock(self.device, to_the_end=False)
            samples = time_in_turns([each.call for each in prepared.values()], clock, self.budget)
            for (name, each), seconds in zip(prepared.items(), samples):
                launches, kernels = calls.count_launches(each.call, self.device)
                has_backward = workload.operation.backward
                self.results.calls.append(
                    Call(
                        **vars(summarize(seconds)),
                        **_subject(workload, name, each),
                        launches=launches,
                        kernels=kernels,
                        held_bytes=calls.held_bytes(each, self._inputs.input) if has_backward else None,
                        peak_bytes=calls.peak_bytes(each.call, self.device),
                    )
                )

        return Step(f"call {workload}", self._guess(workload), run)

    def network(self, case: NetworkCase, names: Sequence[str]) -> Step:
        """Return a step that measures a case of a network by the implementations `names`."""

        def run() -> None:
            self._inputs = None  # make room for the networks
            if self._models is None or self._models.network != case.network:
                self._models = None  # first, since the two may not fit at once
                self._models = Models(case.network, self.device)
            steps, refusals = measure(self._models, case, names, self.network_budget)
            self.results.networks += steps
            self.results.refusals += refusals

        compiled = sum(name in COMPILED for name in names)
        return Step(str(case), 2.0 + len(names) * self.network_budget.seconds + compiled * NETWORK_COMPILE_SECONDS, run)

    @property
    def network_budget(self) -> Budget:
        """The budget of a case of a network, whose calls take as long as hundreds of a layer's."""
        return Budget(8 * self.budget.seconds, warm_up_seconds=0.05, min_rounds=7, max_rounds=101)

    def _guess(self, workload: Workload) -> float:
        compiled = sum(rival.compiles for rival in self.rivals) if workload.compiled else 0
        return self.budget.seconds * len(self.rivals) + 0.2 + COMPILE_SECONDS * compiled + 80e-9 * workload.tensor_bytes

    def _prepare(self, workload: Workload) -> dict[str, Prepared]:
        """Return the implementations that take the workload and pass the gate, by name; record the others."""
        self._make_inputs(workload)
        rivals = [rival for rival in self.rivals if workload.compiled or not rival.compiles]
        prepared = {}
        for each in admit(rivals, workload, self._inputs):
            if each.prepared is None:
                self._refuse(workload, each.name, each.wrong, each.reason)
            else:
                prepared[each.name] = each.prepared
        return prepared

    def _refuse(self, workload: Workload, name: str, wrong: bool, reason: str) -> None:
        refusals = self.results.refusals
        for number, known in enumerate(refusals):
            if (known.implementation, known.wrong, known.reason) == (name, wrong, reason):
                refusals[number] = dataclasses.replace(known, count=known.count + 1)
                return
        about = (workload.case.name, dtype_name(workload.dtype), str(workload.operation))
        refusals.append(Refusal(*about, name, wrong, reason))

    def _make_inputs(self, workload: Workload) -> None:
        made = self._inputs
        self._models = None
        if made is None or (made.case, made.input.dtype) != (workload.case, workload.dtype):
            self._inputs = None  # first, since the two may not fit at once
            self._inputs = make_inputs(workload.case, workload.dtype, self.device)

    def _append_measurements(self, workload: Workload, prepared: dict[str, Prepared], samples) -> None:
        tensor_bytes = workload.tensor_bytes
        floor_bytes = workload.operation.floor_bytes(workload.case.numel, workload.dtype.itemsize)
        for name, each in prepared.items():
            times = summarize(samples[name])
            gb_per_s = floor_bytes / times.median_us / 1e3
            self.results.measurements.append(
                Measurement(
                    **vars(times),
                    **_subject(workload, name, each),
                    tensor_bytes=tensor_bytes,
                    floor_bytes=floor_bytes,
                    gb_per_s=gb_per_s,
                    copy_share=gb_per_s / self.results.copy_gb_per_s(tensor_bytes),
                    speedup_over={rival: speedup(samples[name], samples[rival]) for rival in samples if rival != name},
                )
            )


def _subject(workload: Workload, name: str, prepared: Prepared) -> dict:
    return {
        "group": workload.group,
        "case": workload.case.name,
        "shape": workload.case.shape,
        "layout": workload.case.layout,
        "dtype": dtype_name(workload.dtype),
        "op": str(workload.operation),
        "implementation": name,
        "kernel": prepared.kernel,
    }
