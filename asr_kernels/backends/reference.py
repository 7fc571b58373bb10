"""The float64 reference that the other backends are tested against: simple and slow. Inputs are (N, C, L) views."""

from __future__ import annotations

from torch import Tensor

from ..factors import repair_factors as repair_factors
from ..merging import Moments, merge
from ..window import Window
from . import torch_patches


def channel_moments(x: Tensor, tolerance: float, running: Moments | None) -> Moments:
    """Mean and m2 = sum((x - mean)^2) of each channel, in float64 for any tolerance, merged with `running`."""
    found = Moments(x.shape[0] * x.shape[2], *_moments(x.double()))
    return found if running is None else merge(running, found)[0]


def paired_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and sum((a - mean_a) * (b - mean_b))."""
    a, b = a.double(), b.double()
    mean_a, m2_a = _moments(a)
    mean_b, m2_b = _moments(b)
    comoment = ((a - mean_a[:, None]) * (b - mean_b[:, None])).sum(dim=(0, 2))
    return mean_a, m2_a, mean_b, m2_b, comoment


def affine_(x: Tensor, gain: Tensor, shift: Tensor, relu: bool) -> None:
    """x <- gain * x + shift, rounded once; then ReLU with `relu`."""
    y = gain.double()[:, None] * x.double() + shift.double()[:, None]
    x.copy_(y.relu() if relu else y)


class PatchProducts(torch_patches.PatchProducts):
    """Products of patches in float64."""

    def __init__(self, x: Tensor, y: Tensor, window: Window) -> None:
        super().__init__(x.double(), y.double(), window)


def products_for(x: Tensor, y: Tensor, window: Window) -> type[PatchProducts]:
    """What computes the products of this window."""
    return PatchProducts


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=(0, 2))
    return mean, (x - mean[:, None]).square().sum(dim=(0, 2))
