"""The time that a model spends in its BatchNorm modules, forward and backward, by hooks that change no results."""

import statistics
import time

import torch
from torch import nn

from fastbn._torch import BatchNormBase


class BatchNormTimer:
    """A timer of every BatchNorm of `model`; `with timer:` around a training step measures it.

    Forward is from a module's call to its return. Backward is from the gradient of its output being ready to that of
    its input being ready, and includes the gradients of weight and bias. Both include the cost of launches. The clock
    is the host's on a CPU and CUDA events on the current stream on a GPU.

    A module may be called several times in a step. The time is exact where nothing but the BatchNorm uses its input, as
    in a chain of layers; elsewhere backward also includes work before the last gradient of that input arrives. The
    first `warm_up` steps are left out of the medians.
    """

    def __init__(self, model: nn.Module, device: torch.device, warm_up: int = 5):
        self._clock = _CudaClock() if device.type == "cuda" else _HostClock()
        self._warm_up = warm_up
        self._totals = []
        self._steps = []
        self._spans = None
        self._starts = {}
        for module in model.modules():
            if isinstance(module, BatchNormBase):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def __enter__(self):
        self._spans = {"forward": [], "backward": [], "step": []}
        self._start = self._clock.now()
        return self

    def __exit__(self, *_):
        self._spans["step"].append((self._start, self._clock.now()))
        self._steps.append(self._spans)
        self._spans = None

    def collect(self) -> None:
        """Wait for the device and turn records into times. Once per epoch is enough to keep the events on a GPU few."""
        for spans in self._steps:
            self._totals.append({name: sum(self._clock.milliseconds(*span) for span in spans[name]) for name in spans})
        self._steps = []

    def medians(self) -> dict[str, float]:
        """Return median milliseconds per step: `forward` and `backward` of all BatchNorms, and the whole `step`."""
        self.collect()
        totals = self._totals[self._warm_up :] or self._totals
        return {name: statistics.median(total[name] for total in totals) for name in ("forward", "backward", "step")}

    def _before(self, module, args):
        if self._spans is not None:
            self._starts[module] = self._clock.now()

    def _after(self, module, args, output):
        if self._spans is None:
            return
        spans, clock = self._spans, self._clock
        spans["forward"].append((self._starts.pop(module), clock.now()))
        began = []
        # The hooks are on tensors: full backward hooks of a module would add an identity to the forward pass.
        if output.requires_grad and args[0].requires_grad:
            output.register_hook(lambda grad: began.append(clock.now()))
            args[0].register_hook(lambda grad: spans["backward"].append((began.pop(), clock.now())))


class _HostClock:
    now = staticmethod(time.perf_counter)

    def milliseconds(self, start, end):
        return (end - start) * 1e3


class _CudaClock:
    def now(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end):
        end.synchronize()
        return start.elapsed_time(end)
