"""Networks to measure on, of the size that papers use, with the names that torchvision gives their weights."""

from .resnet import resnet18, resnet50

__all__ = ["resnet18", "resnet50"]
