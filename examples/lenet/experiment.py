"""The demo's experiment: LeNet with sigmoids, which trains poorly without BatchNorm.

Three variants start from one initialisation and see the same batches in the same order.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from examples.lenet.bn_timer import BatchNormTimer
from examples.lenet.data import Dataset
from fastbn.transforms.convert import convert

PLAIN, STOCK, FASTBN = "without BN", "torch.nn", "fastbn"


def lenet(batch_norm: bool) -> nn.Sequential:
    """Make LeNet from (N, 1, 28, 28) float32 images to (N, 10) logits; with `batch_norm`, one before each sigmoid."""
    layers = OrderedDict()

    def add(number, layer, norm, *after):
        layers[f"layer{number}"] = layer
        if batch_norm:
            layers[f"bn{number}"] = norm
        layers[f"sigmoid{number}"] = nn.Sigmoid()
        layers.update(after)

    add(1, nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), ("pool1", nn.MaxPool2d(2)))
    add(2, nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), ("pool2", nn.MaxPool2d(2)), ("flatten", nn.Flatten()))
    add(3, nn.Linear(256, 120), nn.BatchNorm1d(120))
    add(4, nn.Linear(120, 84), nn.BatchNorm1d(84))
    layers["layer5"] = nn.Linear(84, 10)
    return nn.Sequential(layers)


def variants(seed: int) -> dict[str, nn.Sequential]:
    """Return the three nets by name, in training mode on the CPU, with equal convolution and linear parameters."""
    torch.manual_seed(seed)
    stock, plain = lenet(True), lenet(False)
    plain.load_state_dict({key: value for key, value in stock.state_dict().items() if key in plain.state_dict()})
    return {PLAIN: plain, STOCK: stock, FASTBN: convert(copy.deepcopy(stock))}


@dataclass
class Run:
    """One net and its history: one value per epoch. `first_loss` is that of the first batch, before the first update;
    `logits` are those of the test set after the first epoch."""

    net: nn.Sequential
    optimiser: torch.optim.Optimizer
    timer: BatchNormTimer
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    first_loss: float | None = None
    logits: torch.Tensor | None = None


class Experiment:
    """The training of the three variants in lockstep, so that other load on the machine affects all of them alike."""

    def __init__(self, data: Dataset, device: torch.device, *, batch_size: int, lr: float, seed: int):
        self.data = data.to(device)
        self.device = device
        self.batch_size = batch_size
        self._order = torch.Generator().manual_seed(seed)
        self.runs = {}
        for name, net in variants(seed).items():
            net = net.to(device)
            optimiser = torch.optim.SGD(net.parameters(), lr=lr)
            self.runs[name] = Run(net, optimiser, BatchNormTimer(net, device))

    @property
    def steps(self) -> int:
        """Return the steps per epoch. A last batch of one image is left out: it has no statistics for BatchNorm1d."""
        count, size = len(self.data.train_labels), self.batch_size
        return count // size + (count % size > 1)

    def epoch(self) -> Iterator[None]:
        """Train an epoch and test; yields after each step. Appends the mean training loss and the test accuracy."""
        order = torch.randperm(len(self.data.train_labels), generator=self._order).to(self.device)
        # Sums stay on the device: reading them each step would make a GPU wait.
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in self.runs}
        seen = 0
        for index in order.split(self.batch_size)[: self.steps]:
            images, labels = _pixels(self.data.train_images[index]), self.data.train_labels[index]
            for name, run in self.runs.items():
                loss = _train_step(run, images, labels)
                sums[name] += loss * len(index)
                if run.first_loss is None:
                    run.first_loss = loss.item()
            seen += len(index)
            yield
        for name, run in self.runs.items():
            run.loss.append(sums[name].item() / seen)
            run.timer.collect()
            self._test(run)

    def same_net_gap(self) -> tuple[float, float]:
        """Evaluate torch.nn's net, as it now is, by torch.nn and by fastbn, which takes its running statistics along.

        Returns the largest absolute difference of the logits of the test set, and the largest absolute logit.
        """
        stock = self.runs[STOCK].net
        twin = lenet(True).to(self.device)  # a deep copy would take the timer's hooks and CUDA events along
        twin.load_state_dict(stock.state_dict())
        expected, got = self._logits(stock), self._logits(convert(twin))
        return (got - expected).abs().max().item(), expected.abs().max().item()

    def _test(self, run):
        logits = self._logits(run.net)
        run.accuracy.append((logits.argmax(1) == self.data.test_labels).double().mean().item())
        if run.logits is None:
            run.logits = logits

    @torch.no_grad()
    def _logits(self, net):
        net.eval()
        logits = torch.cat([net(_pixels(images)) for images in self.data.test_images.split(1024)])
        net.train()
        return logits


def _train_step(run, images, labels):
    run.optimiser.zero_grad(set_to_none=True)
    with run.timer:
        loss = F.cross_entropy(run.net(images), labels)
        loss.backward()
        run.optimiser.step()
    return loss.detach()


def _pixels(images):
    return images.float() / 255
