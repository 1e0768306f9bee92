"""ResNet-50 v1.5 (He et al. 2015, arXiv:1512.03385, with the stride in the 3x3 convolution), with torchvision's
state_dict keys and shapes.

The layers after a convolution are a parameter: PLAIN leaves normalisation, residual addition and ReLU to an op each, as
torchvision does; FUSED makes them one call of fastbn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import fastbn

# (width of the bottlenecks, number of them, stride of the first)
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
EXPANSION = 4
CLASSES = 1000


@dataclass(frozen=True)
class NormStyle:
    """The layers after a convolution.

    `norm` and `norm_before_relu` make a module from a number of channels; norm_relu(norm_before_relu, input,
    residual=None) applies one.
    """

    norm: Callable[[int], nn.Module]
    norm_before_relu: Callable[[int], nn.Module]
    norm_relu: Callable[..., Tensor]


def _three_ops(norm: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    output = norm(input)
    if residual is not None:
        output += residual
    return F.relu(output, inplace=True)


def _one_op(norm: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    return norm(input, residual)


PLAIN = NormStyle(nn.BatchNorm2d, nn.BatchNorm2d, _three_ops)
FUSED = NormStyle(fastbn.BatchNorm2d, functools.partial(fastbn.BatchNorm2d, activation="relu"), _one_op)


class Bottleneck(nn.Module):
    """1x1 convolution to `width` channels, 3x3 with the stride, 1x1 to EXPANSION times the width; then the input is
    added.
    """

    def __init__(self, in_channels: int, width: int, stride: int, style: NormStyle) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = style.norm_before_relu(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = style.norm_before_relu(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = style.norm_before_relu(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, style.norm(out_channels))
        self.norm_relu = style.norm_relu

    def forward(self, input: Tensor) -> Tensor:
        identity = input if self.downsample is None else self.downsample(input)
        output = self.norm_relu(self.bn1, self.conv1(input))
        output = self.norm_relu(self.bn2, self.conv2(output))
        return self.norm_relu(self.bn3, self.conv3(output), identity)


class ResNet50(nn.Module):
    """ResNet-50 from images (N, 3, H, W) to logits (N, 1000)."""

    def __init__(self, style: NormStyle) -> None:
        super().__init__()
        channels = STAGES[0][0]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
        self.bn1 = style.norm_before_relu(channels)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for number, (width, blocks, stride) in enumerate(STAGES, 1):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(Bottleneck(channels, width, stride if block == 0 else 1, style))
                channels = EXPANSION * width
            self.add_module(f"layer{number}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)
        self.norm_relu = style.norm_relu
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        output = self.maxpool(self.norm_relu(self.bn1, self.conv1(images)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            output = layer(output)
        return self.fc(self.avgpool(output).flatten(1))
