"""A network several ways, from one state_dict: torch's modules, the same model after fastbn.convert without fusion, and
with it; and what is timed of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastbn
from bench.network_cases import FORMATS, NETWORKS, TRAIN, USUAL, NetworkCase, build, make_input
from fastbn.measure.implementations import AGAIN, STOCK
from fastbn.measure.timer import Call

TORCH, CONVERT, FUSED = STOCK, "convert", "fused"
EAGER = (TORCH, CONVERT, FUSED)
COMPILED_TORCH, COMPILED_PASS = "compiled-torch", "compiled-pass"
# Implementations that are compiled, each with the model; COMPILED_PASS with fastbn.compile_pass.
COMPILED = {COMPILED_TORCH: TORCH, "compiled-convert": CONVERT, "compiled-fused": FUSED, COMPILED_PASS: TORCH}
NAMES = (*EAGER, *COMPILED)
SEED = 0


def is_ours(name: str) -> bool:
    """Return whether an implementation of a network runs fastbn."""
    return name.removesuffix(AGAIN) not in (TORCH, COMPILED_TORCH)


def names_of(case: NetworkCase, device: torch.device) -> tuple[str, ...]:
    """Return the implementations that take part in a case where none is named.

    A network takes minutes to compile. So models are compiled on a GPU alone, for training with a usual batch in
    bfloat16 and the last of the network's memory formats, channels_last for images.
    """
    layout = NETWORKS[case.network].layouts[-1]
    usual = (case.op, case.group, case.dtype, case.layout) == (TRAIN, USUAL, torch.bfloat16, layout)
    return NAMES if device.type == "cuda" and usual else EAGER


def model_of(name: str) -> str:
    """Return which of EAGER's models an implementation runs or compiles."""
    once = name.removesuffix(AGAIN)
    return COMPILED.get(once, once)


class Models:
    """The models of a network by the names of EAGER, with the same parameters, which nothing changes.

    verdicts: what the gate found in float64, by memory format.
    """

    def __init__(self, network: str, device: torch.device) -> None:
        self.network, self.device = network, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            stock, self.source = build(network)
        stock.to(device)
        self.modules = {
            TORCH: stock,
            CONVERT: fastbn.convert(copy.deepcopy(stock), fuse=False),
            FUSED: fastbn.convert(copy.deepcopy(stock)),
        }
        self.verdicts: dict[str, dict[str, str | None]] = {}
        self._buffers: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def prepare(self, shape: tuple[int, ...], layout: str, training: bool) -> tuple[Tensor, ...]:
        """Give every model a memory format, a mode, and for running statistics those of an input. Returns the input."""
        input = make_input(self.network, shape, layout, self.device, SEED)
        if shape not in self._buffers:
            # Evaluation is to compute with such values as after training.
            stock = self.modules[TORCH]
            _estimate_statistics(stock, input)
            self._buffers[shape] = {name: buffer.clone() for name, buffer in stock.named_buffers()}
        for model in self.modules.values():
            for name, buffer in model.named_buffers():
                buffer.copy_(self._buffers[shape][name])
            model.to(memory_format=FORMATS[layout]).train(training)
        return input


def _estimate_statistics(model: nn.Module, input: tuple[Tensor, ...]) -> None:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over batches, of which there is one
    with torch.no_grad():
        model.train()(*input)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Work:
    """A model in some mode, and the batch and labels that it runs on. `loss` is that of the latest forward pass.

    run: computes the scores in place of `model`, whose parameters it uses: it may be compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        input: tuple[Tensor, ...],
        labels: Tensor,
        dtype: torch.dtype,
        run: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.input, self.labels = model, input, labels
        self._run = model if run is None else run
        self.is_compiled = run is not None
        self._autocast = torch.autocast(input[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self._parameters = list(model.parameters())

    @property
    def call(self) -> Call:
        """What is timed."""
        return self.step if self.model.training else self.evaluate

    @property
    def phases(self) -> tuple[Call, ...]:
        """The parts of a call, of which the first is forward."""
        return (self.forward, self.backward) if self.model.training else (self.evaluate,)

    def step(self) -> None:
        """Compute scores, loss and fresh gradients."""
        for parameter in self._parameters:
            parameter.grad = None
        self.forward()
        self.backward()

    def forward(self) -> None:
        with self._autocast:
            self.loss = F.cross_entropy(self._run(*self.input), self.labels)

    def backward(self) -> None:
        self.loss.backward()

    def evaluate(self) -> None:
        """Compute scores without gradients."""
        with torch.no_grad(), self._autocast:
            self._run(*self.input)

    def check(self) -> float:
        """Run once as when timed, and return the loss, which evaluation has no other use for."""
        if self.model.training:
            self.step()
        else:
            with torch.no_grad():
                self.forward()
        return self.loss.item()


def works(models: Models, case: NetworkCase, names: Sequence[str]) -> dict[str, Work]:
    """Return the work of torch's model, which the others are compared with, and of those that `names` has."""
    input = models.prepare(case.shape, case.layout, training=False)
    with torch.no_grad():
        scores = models.modules[TORCH](*input)
    generator = torch.Generator(models.device).manual_seed(SEED)
    size = (scores.size(0), *scores.shape[2:])
    labels = torch.randint(scores.size(1), size, generator=generator, device=models.device)
    found = {}
    for name in dict.fromkeys((TORCH, *names)):
        model = models.modules[model_of(name)].train(case.op == TRAIN)
        run = _compiled(model, name) if name.removesuffix(AGAIN) in COMPILED else None
        found[name] = Work(model, input, labels, case.dtype, run)
    return found


def _compiled(model: nn.Module, name: str) -> Callable[..., Tensor]:
    """Return what torch.compile makes of a model in its first call."""
    if name.removesuffix(AGAIN) != COMPILED_PASS:
        return torch.compile(model, dynamic=False)
    custom_pass = fastbn.compile_pass([next(model.parameters()).device.type])
    return torch.compile(model, dynamic=False, options={"pre_grad_custom_pass": custom_pass})
