"""Per-channel moments that merge: count, mean and sum of squared deviations, kept in float64.

Moments from two devices merge too: those of the argument are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class ChannelMoments:
    """First two moments of C channels, each over the same `count` values.

    `mean` and `m2` (the sum of squared deviations from the mean) are float64 of shape (C,); what is given in another
    dtype is converted. A count of 0 stands for nothing seen yet. Merging follows Chan, Golub and LeVeque (1979), so any
    split of the data gives the same answer to rounding.
    """

    count: int
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        self.mean, self.m2 = self.mean.double(), self.m2.double()

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> ChannelMoments:
        """Moments of no values at all, the neutral element of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.mean.numel()

    @property
    def var(self) -> Tensor:
        """Population variance, float64 (C,); NaN while nothing was seen."""
        return self.m2 / self.count if self.count else torch.full_like(self.m2, torch.nan)

    def to(self, device: torch.device | str) -> ChannelMoments:
        """The same moments on `device`; the tensors themselves where they are there already."""
        return ChannelMoments(self.count, self.mean.to(device), self.m2.to(device))

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Moments of both sets of values together, as a new object, on the device of these.

        Raises ValueError when C differs.
        """
        return merge_weighted(self, other)[0]

    @classmethod
    def pool(cls, parts: Sequence[ChannelMoments]) -> ChannelMoments:
        """Moments of the values of all parts together, on the device of the first one.

        As merging one by one, in a few operations for all of them. Raises ValueError for no parts, or where C differs.
        """
        if len({part.channels for part in parts}) != 1:
            raise ValueError(f"cannot pool moments of {[part.channels for part in parts]} channels")
        count = sum(part.count for part in parts)
        if len(parts) == 1 or not count:
            return parts[0]
        parts = [part.to(parts[0].mean.device) for part in parts]
        share = torch.tensor([part.count / count for part in parts], dtype=torch.float64, device=parts[0].mean.device)
        # steps from the first mean: parts of one constant have it for their mean, to the bit
        steps = torch.stack([part.mean for part in parts]) - parts[0].mean
        step = share @ steps
        between = (share * count) @ (steps - step).square()
        return cls(count, parts[0].mean + step, torch.stack([part.m2 for part in parts]).sum(0) + between)

    def affine(self, gain: Tensor, shift: Tensor) -> ChannelMoments:
        """Moments of gain * x + shift, channel by channel; gain and shift float64 (C,), on the same device."""
        return ChannelMoments(self.count, gain * self.mean + shift, gain.square() * self.m2)

    def update_(self, x: Tensor, channel_dim: int = 1) -> ChannelMoments:
        """Take in the values of `x`, shape (N, C, ...), in place; returns self, which is then on the device of x.

        Errors as `channel_moments`.
        """
        from .ops import channel_moments

        merged = channel_moments(x, channel_dim, running=self)
        self.count, self.mean, self.m2 = merged.count, merged.mean, merged.m2
        return self


def merge_weighted(a: ChannelMoments, b: ChannelMoments) -> tuple[ChannelMoments, Tensor, float]:
    """Chan's merge, with the two numbers that a merge of co-moments needs too: the step between the means, its weight.

    Returns (merged, delta, weight), on the device of a: delta = mean_b - mean_a, float64 (C,), and
    weight = n_a * n_b / (n_a + n_b).
    """
    if a.channels != b.channels:
        raise ValueError(f"moments of {a.channels} and of {b.channels} channels do not merge")
    b = b.to(a.mean.device)
    delta = b.mean - a.mean
    if not a.count or not b.count:
        seen = a if a.count else b
        return ChannelMoments(seen.count, seen.mean.clone(), seen.m2.clone()), delta, 0.0
    count = a.count + b.count
    weight = a.count * (b.count / count)
    mean = a.mean + delta * (b.count / count)
    return ChannelMoments(count, mean, a.m2 + b.m2 + delta.square() * weight), delta, weight


@dataclass(eq=False)
class PairedMoments:
    """Moments of two tensors of one shape, and how their channels move together.

    `comoment` is sum((d - mean_d) * (p - mean_p)), float64 (C,), over the same `count` values as the moments.
    """

    dense: ChannelMoments
    pruned: ChannelMoments
    comoment: Tensor

    @property
    def cov(self) -> Tensor:
        """Population covariance, float64 (C,); NaN while nothing was seen."""
        return self.comoment / self.dense.count if self.dense.count else torch.full_like(self.comoment, torch.nan)

    @property
    def corr(self) -> Tensor:
        """Pearson correlation, float64 (C,); 0 where either channel is constant, for a constant explains nothing."""
        scale = (self.dense.m2 * self.pruned.m2).sqrt()
        return torch.where(scale == 0, 0.0, self.comoment / scale).clamp(-1.0, 1.0)

    def merge(self, other: PairedMoments) -> PairedMoments:
        """Paired moments of both sets of values together, as a new object, on the device of these."""
        dense, step_dense, weight = merge_weighted(self.dense, other.dense)
        pruned, step_pruned, _ = merge_weighted(self.pruned, other.pruned)
        theirs = other.comoment.to(self.comoment.device)
        if weight:
            comoment = self.comoment + theirs + step_dense * step_pruned * weight
        else:
            comoment = (self.comoment if self.dense.count else theirs).clone()
        return PairedMoments(dense, pruned, comoment)
