"""What every other path is tested against: float64, obvious, slow. Inputs are (N, C, L) views."""

from __future__ import annotations

from torch import Tensor


def channel_moments(x: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """mean and m2 = sum((x - mean)^2) of each channel, as exact as float64 whatever the tolerance."""
    x = x.double()
    mean = x.mean(dim=(0, 2))
    return mean, (x - mean[:, None]).square().sum(dim=(0, 2))


def paired_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and sum((a - mean_a) * (b - mean_b))."""
    mean_a, m2_a = channel_moments(a)
    mean_b, m2_b = channel_moments(b)
    comoment = ((a.double() - mean_a[:, None]) * (b.double() - mean_b[:, None])).sum(dim=(0, 2))
    return mean_a, m2_a, mean_b, m2_b, comoment


def affine_(x: Tensor, gain: Tensor, shift: Tensor) -> None:
    """x <- gain * x + shift, rounded once."""
    x.copy_(gain.double()[:, None] * x.double() + shift.double()[:, None])
