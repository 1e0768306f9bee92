"""Networks that the benchmark trains where no package brings them: shortened to what is around their BatchNorms.

Each maps a batch to scores, with the classes in dimension 1. Layers before a BatchNorm have no bias, which it would
take away again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NODES_PER_GRAPH = 25


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride; then the input is added."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, input: Tensor) -> Tensor:
        identity = input if self.downsample is None else self.downsample(input)
        output = F.relu(self.bn1(self.conv1(input)), inplace=True)
        output = self.bn2(self.conv2(output))
        output += identity
        return F.relu(output, inplace=True)


class Bottleneck(nn.Module):
    """A 1x1 convolution to `width` channels, 3x3 with the stride, 1x1 to 4 * `width`; then the input is added."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, input: Tensor) -> Tensor:
        identity = input if self.downsample is None else self.downsample(input)
        output = F.relu(self.bn1(self.conv1(input)), inplace=True)
        output = F.relu(self.bn2(self.conv2(output)), inplace=True)
        output = self.bn3(self.conv3(output))
        output += identity
        return F.relu(output, inplace=True)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """ResNet v1.5 (He et al. 2015, arXiv:1512.03385, with the stride in the 3x3 convolution) from images (N, 3, H, W)
    to (N, classes), with torchvision's state_dict keys and shapes. `blocks` counts those of each stage.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        channels = width
        self.conv1 = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            layer = nn.Sequential()
            for index in range(count):
                layer.append(block(channels, width * 2**number, 2 if index == 0 and number > 0 else 1))
                channels = block.expansion * width * 2**number
            self.add_module(name, layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        output = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for name in self.stages:
            output = getattr(self, name)(output)
        return self.fc(self.avgpool(output).flatten(1))


def resnet18() -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2))


def resnet50() -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3))


class ConvNormSiLU(nn.Module):
    """A convolution without change of size but by its stride, BatchNorm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(input)))


class SplitBlock(nn.Module):
    """YOLOv8's C2f: half of the channels go through residual pairs of 3x3 convolutions, and all that was on the way is
    concatenated.
    """

    def __init__(self, in_channels: int, out_channels: int, pairs: int, residual: bool = True) -> None:
        super().__init__()
        half = out_channels // 2
        self.residual = residual
        self.begin = ConvNormSiLU(in_channels, 2 * half)
        self.pairs = nn.ModuleList(
            nn.Sequential(ConvNormSiLU(half, half, 3), ConvNormSiLU(half, half, 3)) for _ in range(pairs)
        )
        self.end = ConvNormSiLU((2 + pairs) * half, out_channels)

    def forward(self, input: Tensor) -> Tensor:
        parts = list(self.begin(input).chunk(2, 1))
        for pair in self.pairs:
            output = pair(parts[-1])
            parts.append(parts[-1] + output if self.residual else output)
        return self.end(torch.cat(parts, 1))


class YOLO(nn.Module):
    """A detector like YOLOv8-nano: five halvings of the size, a path back up, and heads at three sizes, from images
    (N, 3, H, W), H and W multiples of 32, to (N, outputs, positions of all sizes).
    """

    def __init__(self, width: int = 16, outputs: int = 84) -> None:
        super().__init__()
        w1, w2, w3, w4, w5 = (width * 2**power for power in range(5))
        self.stem = nn.Sequential(ConvNormSiLU(3, w1, 3, 2), ConvNormSiLU(w1, w2, 3, 2), SplitBlock(w2, w2, 1))
        self.down3 = nn.Sequential(ConvNormSiLU(w2, w3, 3, 2), SplitBlock(w3, w3, 2))
        self.down4 = nn.Sequential(ConvNormSiLU(w3, w4, 3, 2), SplitBlock(w4, w4, 2))
        self.down5 = nn.Sequential(ConvNormSiLU(w4, w5, 3, 2), SplitBlock(w5, w5, 1))
        self.up4 = SplitBlock(w5 + w4, w4, 1, residual=False)
        self.up3 = SplitBlock(w4 + w3, w3, 1, residual=False)
        self.heads = nn.ModuleList(
            nn.Sequential(ConvNormSiLU(channels, w3, 3), ConvNormSiLU(w3, w3, 3), nn.Conv2d(w3, outputs, 1))
            for channels in (w3, w4, w5)
        )

    def forward(self, images: Tensor) -> Tensor:
        c3 = self.down3(self.stem(images))
        c4 = self.down4(c3)
        c5 = self.down5(c4)
        p4 = self.up4(torch.cat([F.interpolate(c5, scale_factor=2.0), c4], 1))
        p3 = self.up3(torch.cat([F.interpolate(p4, scale_factor=2.0), c3], 1))
        scores = [head(level).flatten(2) for head, level in zip(self.heads, (p3, p4, c5), strict=True)]
        return torch.cat(scores, 2)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with BatchNorm: pairs of 3x3 convolutions on the way down and
    up, from images (N, 3, H, W), H and W multiples of 2 ** (number of widths - 1), to (N, classes, H, W).
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), classes: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(_conv_pair(*pair) for pair in zip((3, *widths), widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(lower, upper, 2, 2) for lower, upper in pairs)
        self.up = nn.ModuleList(_conv_pair(2 * upper, upper) for _, upper in pairs)
        self.scores = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        output = self.down[0](images)
        for down in self.down[1:]:
            kept.append(output)
            output = down(F.max_pool2d(output, 2))
        for grow, up in zip(self.grow, self.up, strict=True):
            output = up(torch.cat([kept.pop(), grow(output)], 1))
        return self.scores(output)


def _conv_pair(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class GIN(nn.Module):
    """Graph isomorphism network (Xu et al. 2018, arXiv:1810.00826): each layer adds to a node's features those of its
    neighbours. From features (nodes, F) and edges (2, E) to (graphs, classes), a graph being NODES_PER_GRAPH nodes.
    """

    def __init__(self, features: int = 32, hidden: int = 64, layers: int = 5, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(features if number == 0 else hidden, hidden, bias=False), nn.BatchNorm1d(hidden)),
                *(nn.ReLU(inplace=True), nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden)),
                nn.ReLU(inplace=True),
            )
            for number in range(layers)
        )
        self.scores = nn.Linear(hidden, classes)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = layer(nodes.index_add(0, edges[1], nodes[edges[0]]))
        return self.scores(nodes.unflatten(0, (-1, NODES_PER_GRAPH)).sum(1))


def mlp(features: int = 32, hidden: int = 256, layers: int = 4, classes: int = 10) -> nn.Sequential:
    """Return a network for tables, from (N, features) to (N, classes): Linear, BatchNorm and ReLU, time and again."""
    model = nn.Sequential()
    for number in range(layers):
        model.append(nn.Linear(features if number == 0 else hidden, hidden, bias=False))
        model.append(nn.BatchNorm1d(hidden))
        model.append(nn.ReLU(inplace=True))
    return model.append(nn.Linear(hidden, classes))


class PointNet(nn.Module):
    """PointNet (Qi et al. 2016, arXiv:1612.00593) with both transforms, from points (N, 3, points) to (N, classes)."""

    def __init__(self, classes: int = 40) -> None:
        super().__init__()
        self.transform3, self.transform64 = _Transform(3), _Transform(64)
        self.first = _shared(3, 64)
        self.rest = nn.Sequential(*_shared(64, 128), nn.Conv1d(128, 1024, 1, bias=False), nn.BatchNorm1d(1024))
        self.scores = nn.Sequential(*_dense(1024, 512, 256), nn.Linear(256, classes))

    def forward(self, points: Tensor) -> Tensor:
        output = self.first(self.transform3(points) @ points)
        output = self.rest(self.transform64(output) @ output)
        return self.scores(output.amax(2))


class _Transform(nn.Module):
    """A matrix (N, size, size) for points (N, size, points), which begins near the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shared = _shared(size, 64, 128, 1024)
        self.dense = nn.Sequential(*_dense(1024, 512, 256), nn.Linear(256, size * size))
        self.register_buffer("identity", torch.eye(size), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        size = points.size(1)
        return self.dense(self.shared(points).amax(2)).view(-1, size, size) + self.identity


def _shared(*channels: int) -> nn.Sequential:
    """Return layers that every point goes through by itself."""
    pairs = zip(channels, channels[1:])
    blocks = ((nn.Conv1d(*pair, 1, bias=False), nn.BatchNorm1d(pair[1]), nn.ReLU(inplace=True)) for pair in pairs)
    return nn.Sequential(*(layer for block in blocks for layer in block))


def _dense(*features: int) -> nn.Sequential:
    pairs = zip(features, features[1:])
    blocks = ((nn.Linear(*pair, bias=False), nn.BatchNorm1d(pair[1]), nn.ReLU(inplace=True)) for pair in pairs)
    return nn.Sequential(*(layer for block in blocks for layer in block))
