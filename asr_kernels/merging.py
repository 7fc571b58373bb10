"""Moments as the backends read and return them, and the formula that merges two (Chan, Golub and LeVeque 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Moments:
    """First two moments of C channels, each over the same `count` values.

    `mean` and `m2` (the sum of squared deviations from the mean) are float64 of shape (C,); other dtypes are converted.
    A count of 0 means that there are no values yet.
    """

    count: int
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        self.mean, self.m2 = self.mean.double(), self.m2.double()

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.mean.numel()

    @property
    def var(self) -> Tensor:
        """Population variance, float64 (C,); NaN while there are no values."""
        return self.m2 / self.count if self.count else torch.full_like(self.m2, torch.nan)


def merge(a: Moments, b: Moments) -> tuple[Moments, Tensor, float]:
    """Moments of the values of a and b together, on the device of a, and two numbers for the merge of co-moments.

    Returns (merged, delta, weight): delta = mean_b - mean_a, float64 (C,); weight = n_a * n_b / (n_a + n_b), or 0
    where a or b has no values. Raises ValueError where C differs.
    """
    if a.channels != b.channels:
        raise ValueError(f"moments of {a.channels} and of {b.channels} channels do not merge")
    b = Moments(b.count, b.mean.to(a.mean.device), b.m2.to(a.mean.device))
    delta = b.mean - a.mean
    if not a.count or not b.count:
        seen = a if a.count else b
        return Moments(seen.count, seen.mean.clone(), seen.m2.clone()), delta, 0.0
    count = a.count + b.count
    weight = a.count * (b.count / count)
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * weight), delta, weight
