"""A training step of ResNet-50 several ways, from one state_dict: torch's modules, the same model through
fastbn.convert, and calls of fastbn's layers by hand; on a GPU also the first two compiled, and torch's compiled with
fastbn.compile_pass. A step is forward, cross-entropy, backward and SGD on one batch of random images and labels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastbn
from bench import resnet50
from bench.implementations import serving
from bench.results import NetworkStep, Refusal
from bench.timer import Budget, Call, IdleClock, speedup, summarize, time_in_turns
from bench.workloads import dtype_name

NETWORK = "resnet50"
TORCH, CONVERT, FUSED = "torch", "convert", "fused"
COMPILED = COMPILED_TORCH, COMPILED_CONVERT, COMPILED_PASS = (
    "compiled torch",
    "compiled convert",
    "compiled torch with pass",
)
OWN_SOURCE = "bench/resnet50.py"
BUDGET = Budget(seconds=10, warm_up_seconds=1, min_rounds=3, max_rounds=101)
# A tenth of the usual rate: hundreds of steps on the same batch stay finite.
LEARNING_RATE = 0.01
SEED = 0
# Images of the float64 pass of the gate; more would cost memory and prove no more.
GATE_IMAGES = 8

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_DTYPES = (torch.float32, torch.bfloat16)
_FORWARD_OPS = {"aten::relu", "aten::relu_", "aten::clamp_min", "aten::clamp_min_", "aten::add_"}
_BACKWARD_OPS = {"aten::threshold_backward"}


@dataclass(frozen=True)
class NetworkCase:
    """A batch of square images. `dtype` is float32, or bfloat16 for autocast with float32 parameters."""

    batch: int
    image_size: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "channels_last"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"expected a dtype of {_DTYPES}, got {self.dtype}")
        if self.layout not in _FORMATS:
            raise ValueError(f"expected a layout of {tuple(_FORMATS)}, got {self.layout!r}")

    def __str__(self) -> str:
        return f"{NETWORK} {self.batch}x3x{self.image_size}x{self.image_size} {self.layout}"


class Training:
    """A model, its optimizer and the one batch it trains on. `loss` is that of the latest forward pass.

    run: computes the logits in place of `model`, whose parameters it uses: it may be compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        source: str,
        images: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        run: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.source, self.images, self.labels = model, source, images, labels
        self._run = model if run is None else run
        self.is_compiled = run is not None
        self._autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self._optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def forward(self) -> None:
        with self._autocast:
            self.loss = F.cross_entropy(self._run(self.images), self.labels)

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.forward()
        self.backward()
        self.update()


def measure(
    case: NetworkCase, device: torch.device, budget: Budget = BUDGET
) -> tuple[list[NetworkStep], list[Refusal]]:
    """Time a step of each implementation in turns, except those that the gate refuses.

    peak_bytes is the maximum that a step allocates at once beyond parameters, momenta and the batch.
    """
    with _cudnn_benchmark():
        steps, refusals = _measure(case, device, budget)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next case allocates other sizes
    return steps, refusals


def _measure(case: NetworkCase, device: torch.device, budget: Budget) -> tuple[list[NetworkStep], list[Refusal]]:
    trainings = _trainings(case, device)
    refusals = _gate(trainings, case, device)
    for refusal in refusals:
        del trainings[refusal.implementation]
    first_losses = {name: training.loss.item() for name, training in trainings.items()}
    calls = [training.step for training in trainings.values()]
    samples = dict(zip(trainings, time_in_turns(calls, IdleClock(device, to_the_end=True), budget) if calls else []))
    steps = [
        NetworkStep(
            **asdict(summarize(samples[name])),
            network=NETWORK,
            source=training.source,
            batch=case.batch,
            image_size=case.image_size,
            dtype=dtype_name(case.dtype),
            layout=case.layout,
            implementation=name,
            norm_share=norm_share(training),
            first_loss=first_losses[name],
            peak_bytes=_peak_bytes(training, device),
            speedup_over={rival: speedup(samples[name], samples[rival]) for rival in samples if rival != name},
        )
        for name, training in trainings.items()
    ]
    return steps, refusals


def norm_share(training: Training) -> float | None:
    """Return the fraction of the profiled time of a step spent in BatchNorm, ReLU, residual addition and their
    backward.

    It is counted by op, as `is_norm_op` says: device time of the kernels that an op launched or, on a CPU, the op's own
    time. None where the profiler saw no time, and of compiled models, whose kernels belong to no op. Forward, backward
    and update are profiled one by one, since the name of an op does not tell a residual addition from a sum of
    gradients or an update of parameters.
    """
    if training.is_compiled:
        return None
    device = training.images.device
    forward, backward, update = (
        profiled(run, device) for run in (training.forward, training.backward, training.update)
    )
    total = sum(phase.total for phase in (forward, backward, update))
    norm = sum(
        microseconds
        for phase, is_forward in ((forward, True), (backward, False))
        for op, microseconds in phase.by_op.items()
        if is_norm_op(op, is_forward)
    )
    return norm / total if total > 0 else None


def is_norm_op(op: str, forward: bool) -> bool:
    """Return whether an op of the forward or backward pass is BatchNorm, ReLU or residual addition.

    In forward, add_ is the residual addition or, in torch's BatchNorm, the count of batches. In backward, sums of
    gradients at a block's fork are autograd's, whoever computed them.
    """
    if op.startswith("fastbn::") or (op.startswith("aten::") and "batch_norm" in op):
        return True
    return op in (_FORWARD_OPS if forward else _BACKWARD_OPS)


@dataclass(frozen=True)
class Profile:
    """Microseconds of a profiled run: of each op, and in total, on a GPU with the kernels that no op launched."""

    by_op: dict[str, float]
    total: float


def profiled(run: Call, device: torch.device) -> Profile:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        run()
    events = profiler.key_averages()
    ops = [event for event in events if event.device_type == DeviceType.CPU]
    if not on_gpu:
        by_op = {event.key: event.self_cpu_time_total for event in ops}
        return Profile(by_op, sum(by_op.values()))
    # The time of a kernel is in its own event and again in that of the op that launched it.
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    by_op = {event.key: event.self_device_time_total for event in ops}
    return Profile(by_op, sum(event.self_device_time_total for event in kernels))


def _trainings(case: NetworkCase, device: torch.device) -> dict[str, Training]:
    generator = torch.Generator(device).manual_seed(SEED)
    size = (case.batch, 3, case.image_size, case.image_size)
    memory_format = _FORMATS[case.layout]
    images = torch.randn(size, generator=generator, device=device).to(memory_format=memory_format)
    labels = torch.randint(resnet50.CLASSES, (case.batch,), generator=generator, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        plain, fused = resnet50.ResNet50(resnet50.PLAIN), resnet50.ResNet50(resnet50.FUSED)
        stock, source = _stock(plain)
    for model in (stock, fused):
        model.load_state_dict(plain.state_dict())
        model.to(device, memory_format=memory_format)
    models = {
        TORCH: (stock, source),
        CONVERT: (fastbn.convert(copy.deepcopy(stock)), source),
        FUSED: (fused, OWN_SOURCE),
    }
    trainings = {name: Training(*model, images, labels, case.dtype) for name, model in models.items()}
    # On a CPU the compiler would take minutes, for kernels that few train with.
    if device.type == "cuda":
        trainings |= _compiled(stock, source, images, labels, case.dtype)
    return trainings


def _compiled(stock: nn.Module, source: str, images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict[str, Training]:
    """Return trainings of copies of a model that torch.compile compiles in their first step."""
    options = {"pre_grad_custom_pass": fastbn.compile_pass([images.device.type])}
    given = {
        COMPILED_TORCH: (copy.deepcopy(stock), {}),
        COMPILED_CONVERT: (fastbn.convert(copy.deepcopy(stock)), {}),
        COMPILED_PASS: (copy.deepcopy(stock), {"options": options}),
    }
    return {
        name: Training(model, source, images, labels, dtype, torch.compile(model, **arguments))
        for name, (model, arguments) in given.items()
    }


def _stock(plain: nn.Module) -> tuple[nn.Module, str]:
    """Return torchvision's model where it is installed, else ours. timm needs torchvision, so it is not tried."""
    try:
        import torchvision
    except Exception:  # a torchvision of another torch than this fails by other errors than ImportError
        return plain, OWN_SOURCE
    return torchvision.models.resnet50(), f"torchvision {torchvision.__version__}"


def _gate(trainings: dict[str, Training], case: NetworkCase, device: torch.device) -> list[Refusal]:
    """Take the first step of each, and refuse those that fastbn cannot run here or that disagree with torch's.

    The loss of the first step has to agree within `loss_tolerance`, which in bfloat16 is wide enough for a network that
    leaves out a residual addition. So a pass of a few images in float64 has to agree too.
    """
    refusal = functools.partial(Refusal, str(case), dtype_name(case.dtype), "step")
    backend, why = serving(device)
    tolerance = loss_tolerance(case.dtype, device)
    expected = float64_pass(trainings[TORCH])
    refusals = []
    for name, training in trainings.items():
        if name not in (TORCH, COMPILED_TORCH) and backend is None:
            refusals.append(refusal(name, False, why))
            continue
        reason = None if name in (TORCH, COMPILED_TORCH) else _disagreement(float64_pass(training), expected)
        training.step()
        loss, stock_loss = training.loss.item(), trainings[TORCH].loss.item()
        if reason is None and not abs(loss - stock_loss) <= tolerance * stock_loss:
            reason = f"the first loss is {loss:.6g}, torch's {stock_loss:.6g}"
        if reason is not None:
            refusals.append(refusal(name, True, reason))
    return refusals


def loss_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative tolerance of the first loss: half of the digits of the type that convolutions compute in.

    In training mode an untrained ResNet-50 multiplies rounding errors by some thousands on the way to its logits, which
    is 1 / sqrt(eps) of float32. In bfloat16 the logits then agree in little more than their mean over the batch; the
    loss, itself a mean over the batch, moves less.
    """
    tf32_eps = 2**-10  # what cuDNN's convolutions of float32 round to unless told otherwise
    eps = tf32_eps if dtype == torch.float32 and device.type == "cuda" else torch.finfo(dtype).eps
    return math.sqrt(eps)


def float64_pass(training: Training) -> dict[str, Tensor]:
    """Compute logits, gradients and running statistics of a training pass of a copy of the model in float64."""
    model = copy.deepcopy(training.model).double()
    logits = model(training.images[:GATE_IMAGES].double())
    F.cross_entropy(logits, training.labels[:GATE_IMAGES]).backward()
    gradients = {f"the gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"the logits": logits.detach(), **gradients, **dict(model.named_buffers())}


def _disagreement(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Return why results of `float64_pass` differ by more than rounding, or None.

    Half of the digits have to agree, as in a loss. Rounding grows less here, except for batches so small that the last
    BatchNorms see two or three values per channel.
    """
    tolerance = math.sqrt(torch.finfo(torch.float64).eps)
    for name, tensor in expected.items():
        # Integers, the counts of batches, have no norm.
        error = (torch.dist(actual[name].double(), tensor.double()) / tensor.double().norm()).item()
        if not error <= tolerance:
            return f"in float64, {name} is off torch's by {error:.2g} of its norm"
    return None


def _peak_bytes(training: Training, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    training.step()
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
