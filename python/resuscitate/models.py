"""Small networks for examples: the CIFAR ResNets of He et al. (2015), and a ResNet for 8x8 digits."""

from __future__ import annotations

from difflib import get_close_matches

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A of He et al. 2015, section 4.1).

    Where the block has stride 2 or widens, the shortcut takes every `stride`-th pixel and pads zero channels on both
    sides. Maps (N, inputs, H, W) to (N, planes, H / stride, W / stride), rounded up. `planes - inputs` must be even.
    """

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, (planes - inputs) // 2

    def shortcut(self, x: Tensor) -> Tensor:
        """The input, or the subsampled and zero-padded input where the shape changes."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding)) if self.padding else x

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 convolution, three stages of `blocks` BasicBlocks, global average pooling and a linear classifier.

    Maps (N, inputs, H, W) images to (N, classes) logits; stages 2 and 3 halve the resolution. Weights are initialised
    as He et al. do (Kaiming normal). `torch.fx` can trace it.
    """

    def __init__(
        self, blocks: int, *, inputs: int = 3, widths: tuple[int, int, int] = (16, 32, 64), classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.linear = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of normalised images."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, planes, stride)
    return nn.Sequential(first, *[BasicBlock(planes, planes) for _ in range(blocks - 1)])


def resnet20() -> ResNet:
    """ResNet-20 for CIFAR-10: (N, 3, 32, 32) normalised images to 10 logits, 0.27 M parameters."""
    return ResNet(3)


def resnet32() -> ResNet:
    """ResNet-32 for CIFAR-10, 0.46 M parameters."""
    return ResNet(5)


def resnet44() -> ResNet:
    """ResNet-44 for CIFAR-10, 0.66 M parameters."""
    return ResNet(7)


def resnet56() -> ResNet:
    """ResNet-56 for CIFAR-10, 0.85 M parameters."""
    return ResNet(9)


def digitnet() -> ResNet:
    """The demo's ResNet-14 for scikit-learn's digits: (N, 1, 8, 8) grey images, scaled to 0..1, to 10 logits.

    0.4 M parameters: wide enough that a repair can restore accuracy after global pruning to 95 %.
    """
    return ResNet(2, inputs=1, widths=(24, 48, 96))


MODELS = {make.__name__: make for make in (digitnet, resnet20, resnet32, resnet44, resnet56)}


def build(name: str) -> nn.Module:
    """A new, randomly initialised model by its name in `MODELS`; ValueError, listing the names, for another name."""
    if name not in MODELS:
        close = get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"no model is named {name!r}{hint}; the models are {', '.join(MODELS)}")
    return MODELS[name]()
