"""The float64 reference that the other backends are tested against: simple and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import repair_factors as repair_factors
from ..merging import Moments, merge
from ..views import contiguous_ncl, ncl_parts
from ..window import Window
from . import torch_patches


@torch.no_grad()
def channel_moments(x: Tensor, channel_dim: int, tolerance: float, running: Moments | None) -> Moments:
    """Mean and m2 = sum((x - mean)^2) of each channel, in float64 for any tolerance, merged with `running`."""
    (x,) = contiguous_ncl(x, channel_dim=channel_dim)
    found = Moments(x.shape[0] * x.shape[2], *_moments(x.double()))
    return found if running is None else merge(running, found)[0]


@torch.no_grad()
def paired_moments(a: Tensor, b: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and sum((a - mean_a) * (b - mean_b))."""
    a, b = (x.double() for x in contiguous_ncl(a, b, channel_dim=channel_dim))
    mean_a, m2_a = _moments(a)
    mean_b, m2_b = _moments(b)
    comoment = ((a - mean_a[:, None]) * (b - mean_b[:, None])).sum(dim=(0, 2))
    return mean_a, m2_a, mean_b, m2_b, comoment


@torch.no_grad()
def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift, rounded once; then ReLU with `relu`."""
    for part in ncl_parts(x, channel_dim):
        y = gain.double()[:, None] * part.double() + shift.double()[:, None]
        part.copy_(y.relu() if relu else y)


class Sums(torch_patches.Sums):
    """Sums of products of patches, in float64."""

    def __init__(self, x: Tensor, y: Tensor, window: Window) -> None:
        super().__init__(x, y, window, torch.float64)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=(0, 2))
    return mean, (x - mean[:, None]).square().sum(dim=(0, 2))
