"""ResNet-18 and ResNet-50 (He et al. 2015, table 1), stride on the 3x3 convolution; torchvision's state-dict keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution padded to keep the size at stride 1, and its BatchNorm."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, planes, 3, stride)
        self.conv2, self.bn2 = conv_bn(planes, planes, 3)
        self.downsample = _projection(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The branch plus the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the last has 4 x planes channels."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, planes, 1)
        self.conv2, self.bn2 = conv_bn(planes, planes, 3, stride)
        self.conv3, self.bn3 = conv_bn(planes, planes * 4, 1)
        self.downsample = _projection(inputs, planes * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The branch plus the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """Stem, four stages, global average pooling, a linear classifier: (N, 3, H, W) to (N, classes).

    `small` replaces the stem for ImageNet (7x7 at stride 2, then 3x3 max pooling at stride 2) by one 3x3 convolution,
    for images of 32x32; `width` is the width of the first stage, and `depths` has the number of blocks in each stage.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: list[int], *, classes: int, small: bool, width: int
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, width, 3) if small else conv_bn(3, width, 7, 2)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{stage + 1}" for stage in range(len(depths))]
        inputs, expansion = width, block.expansion
        for stage, depth in enumerate(depths):
            planes, blocks = width << stage, []
            for i in range(depth):
                blocks.append(block(inputs, planes, 2 if stage and not i else 1))
                inputs = planes * expansion
            self.add_module(self.stages[stage], nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential() if stride == 1 and inputs == outputs else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))


def resnet18(*, classes: int = 1000, small: bool = False, width: int = 64) -> ResNet:
    """11.7 M parameters with 1,000 classes."""
    return ResNet(BasicBlock, [2, 2, 2, 2], classes=classes, small=small, width=width)


def resnet50(*, classes: int = 1000, small: bool = False, width: int = 64) -> ResNet:
    """25.6 M parameters with 1,000 classes."""
    return ResNet(Bottleneck, [3, 4, 6, 3], classes=classes, small=small, width=width)
