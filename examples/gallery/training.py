"""Nets, batches and steps that several pictures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbn
from examples.lenet.data import Dataset

CHANNELS = (8, 16, 32)


class Images:
    """The first `count` images of a data set, float32 (n, 1, 28, 28) with mean 0 and variance 1, and its test images.

    A data set with fewer images gives all that it has. Mean and variance are those of the training images.
    """

    def __init__(self, data: Dataset, count: int, test_count: int = 2000):
        images = data.train_images[:count].float()
        mean, std = images.mean(), images.std()
        self.train, self.train_labels = (images - mean) / std, data.train_labels[:count]
        self.test, self.test_labels = (
            (data.test_images[:test_count].float() - mean) / std,
            data.test_labels[:test_count],
        )

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` batches of images and labels, in an order that a seed gives, in as many epochs as they take."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.train)
        epochs = math.ceil(steps / (count // size))
        for index in [
            part
            for _ in range(epochs)
            for part in torch.randperm(count, generator=generator)[: count // size * size].split(size)
        ][:steps]:
            yield self.train[index], self.train_labels[index]


def vgg(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Make a small VGG from (N, 1, 28, 28) float32 images to (N, 10) logits: six convolutions of 3x3, by twos.

    `norm` makes what follows a convolution of some channels. Weights are He's (2015), so that the net trains without
    normalisation too.
    """
    layers: list[nn.Module] = []
    before = 1
    for channels in CHANNELS:
        for _ in range(2):
            layers += [nn.Conv2d(before, channels, 3, padding=1), norm(channels), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * 9, 10))
    return he_initialised(model)


def he_initialised(model: nn.Module) -> nn.Module:
    """Give convolutions weights of variance 2 / fan_in and biases of 0 (He et al. 2015, equation 10). In place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def batch_norm(channels: int) -> nn.Module:
    return fastbn.BatchNorm2d(channels)


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of the images that a model classifies correctly, in the mode in which it is."""
    correct = [model(part).argmax(1) == truth for part, truth in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(correct).double().mean().item()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Take a step of training. Returns the loss before it: the mean cross-entropy."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()
