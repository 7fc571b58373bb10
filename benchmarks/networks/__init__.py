"""Networks of the sizes that papers use, with torchvision's names for their weights, and two compact ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .densenet import DenseNet, densenet121
from .mobilenet import mobilenet_v1, mobilenet_v2
from .resnet import BasicBlock, ResNet, resnet18, resnet50
from .vgg import VGG, vgg16_bn

__all__ = ["NETS", "build", "densenet121", "mobilenet_v1", "mobilenet_v2", "resnet18", "resnet50", "vgg16_bn"]

# with stems for images of 32x32; the toys are for tests
NETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: resnet18(classes=classes, small=True),
    "resnet50": lambda classes: resnet50(classes=classes, small=True),
    "densenet121": lambda classes: densenet121(classes=classes),
    "vgg16_bn": lambda classes: vgg16_bn(classes=classes),
    "mobilenet_v1": lambda classes: mobilenet_v1(classes=classes),
    "mobilenet_v2": lambda classes: mobilenet_v2(classes=classes),
    "toy-resnet": lambda classes: ResNet(BasicBlock, [1, 1], classes=classes, small=True, width=8),
    "toy-densenet": lambda classes: DenseNet([2, 2], growth=4, classes=classes),
    "toy-vgg": lambda classes: VGG([[8, 8], [16]], classes=classes),
}


def build(name: str, classes: int = 10) -> nn.Module:
    """A network for images of 32x32 pixels with random weights. Raises ValueError for an unknown name."""
    if name not in NETS:
        raise ValueError(f"no network {name!r}; there are {', '.join(NETS)}")
    return NETS[name](classes)
