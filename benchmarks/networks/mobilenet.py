"""Small networks for images of 32x32 after MobileNetV1 and MobileNetV2 (arXiv 1704.04861, 1801.04381)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# output channels and stride of each block; of V2 the expansion, output channels, number of blocks, stride of the first
V1 = (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)
V2 = (1, 8, 1, 1), (4, 12, 2, 2), (4, 20, 2, 1), (4, 32, 2, 2), (4, 56, 2, 1)


class MobileNet(nn.Module):
    """Blocks, global average pooling, and a linear layer: (N, 3, H, W) to (N, classes)."""

    def __init__(self, blocks: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class InvertedResidual(nn.Module):
    """A pointwise expansion, a depthwise 3x3, a pointwise projection without ReLU; a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        first = [] if expansion == 1 else [_conv(inputs, wide, 1)]
        self.conv = nn.Sequential(*first, _conv(wide, wide, 3, stride, wide), _conv(wide, outputs, 1, relu=False))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def mobilenet_v1(*, classes: int = 10) -> MobileNet:
    """Pairs of a depthwise 3x3 and a pointwise convolution; 141,994 parameters with 10 classes."""
    blocks: list[nn.Module] = [_conv(3, 16, 3)]
    inputs = 16
    for outputs, stride in V1:
        blocks += [_conv(inputs, inputs, 3, stride, inputs), _conv(inputs, outputs, 1)]
        inputs = outputs
    return MobileNet(blocks, inputs, classes)


def mobilenet_v2(*, classes: int = 10) -> MobileNet:
    """Inverted residuals with linear bottlenecks; 77,370 parameters with 10 classes."""
    blocks: list[nn.Module] = [_conv(3, 16, 3)]
    inputs = 16
    for expansion, outputs, repeats, first_stride in V2:
        for index in range(repeats):
            blocks.append(InvertedResidual(inputs, outputs, 1 if index else first_stride, expansion))
            inputs = outputs
    return MobileNet([*blocks, _conv(inputs, 160, 1)], 160, classes)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """A convolution, BatchNorm and, if asked for, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if relu else []))
