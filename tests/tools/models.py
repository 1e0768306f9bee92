"""The small network that tools are tried on, of torch's layers and of fastbn's, with equal parameters and buffers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fastbn

CHANNELS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + y)


def pair() -> tuple[nn.Module, nn.Module]:
    """Return a network of torch's layers, and its copy of fastbn's; no parameter or buffer has its initial value."""
    torch.manual_seed(0)
    stock = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 2))
    with torch.no_grad():
        for tensor in (*stock.parameters(), *stock.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    return stock, fastbn.convert(copy.deepcopy(stock))


def images(count: int = 4, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of a model, torch's and fastbn's."""
    return [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, fastbn.FrozenBatchNorm2d))]


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return output, gradients and the state after one step of forward and backward."""
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    grads = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach()} | grads | {key: value.clone() for key, value in model.state_dict().items()}
