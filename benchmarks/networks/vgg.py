"""VGG-16 with BatchNorm (Simonyan and Zisserman 2014, column D), with torchvision's keys for the convolutions.

The convolutions have biases, as in torchvision. The classifier is one linear layer on the 512 pooled channels, in place
of the three for ImageNet, which have most of that network's weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each followed by 2x2 max pooling, then linear: (N, 3, H, W) to (N, classes).

    `stages` has, for each stage, the channels of its convolutions.
    """

    def __init__(self, stages: list[list[int]], *, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in stages:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def vgg16_bn(*, classes: int = 10) -> VGG:
    """14,728,266 parameters with 10 classes."""
    return VGG([[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3], classes=classes)
