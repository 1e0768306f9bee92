"""Times networks as models are run: a training step (forward, cross-entropy and backward on one random batch, without
an optimiser, which would cost the same in each), or an evaluation without gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from bench.network_cases import TRAIN, NetworkCase
from bench.network_gate import float64_disagreements, gate
from bench.network_models import COMPILED_PASS, Models, Work, works
from bench.norm_share import norm_share
from bench.results import NetworkStep, Refusal
from fastbn.measure.implementations import AGAIN
from fastbn.measure.timer import Budget, IdleClock, speedup, summarize, time_in_turns
from fastbn.measure.workload import dtype_name


def measure(
    models: Models, case: NetworkCase, names: Sequence[str], budget: Budget
) -> tuple[list[NetworkStep], list[Refusal]]:
    """Time the implementations `names` of a case in turns, except those that the gate refuses.

    A name with AGAIN is a second instance. The gate compares with torch's, whether that is timed or not. Evaluation is
    not timed with fastbn.compile_pass, which leaves it alone.
    """
    if case.op != TRAIN:
        names = [name for name in names if name.removesuffix(AGAIN) != COMPILED_PASS]
    # Earlier cases count towards torch.compile's limit of recompilations, above which it runs eagerly.
    torch.compiler.reset()
    with _cudnn_benchmark():
        disagreements = float64_disagreements(models, case.layout)
        ready = works(models, case, names)
        losses, refusals = gate(ready, disagreements, case, models.device)
        timed = {name: ready[name] for name in names if name in losses}
        calls = [work.call for work in timed.values()]
        clock = IdleClock(models.device, to_the_end=True)
        samples = dict(zip(timed, time_in_turns(calls, clock, budget) if calls else []))
        steps = [
            NetworkStep(
                **asdict(summarize(samples[name])),
                network=case.network,
                source=models.source,
                group=case.group,
                shape=case.shape,
                dtype=dtype_name(case.dtype),
                layout=case.layout,
                op=case.op,
                implementation=name,
                # The kernels of a compiled model belong to no op.
                norm_share=None if work.is_compiled else norm_share(work.phases, models.device),
                first_loss=losses[name],
                peak_bytes=_peak_bytes(work, models.device),
                speedup_over={rival: speedup(samples[name], samples[rival]) for rival in samples if rival != name},
            )
            for name, work in timed.items()
        ]
    if models.device.type == "cuda":
        torch.cuda.empty_cache()  # the next case allocates other sizes
    return steps, refusals


def _peak_bytes(work: Work, device: torch.device) -> int | None:
    """Return the maximum that a call allocates at once beyond parameters and the batch; on a CPU none is known."""
    if device.type != "cuda":
        return None
    for parameter in work.model.parameters():
        parameter.grad = None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work.call()
    return torch.cuda.max_memory_allocated(device) - before


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN search for the fastest convolutions, as users who care about the time of a step do."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
