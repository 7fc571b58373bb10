"""Moments of each channel: measured from a tensor, merged, transformed. Count, mean and sum of squared deviations.

Moments are float64. Merging moments from two devices moves the argument's to the device of `self`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compiled, eager
from .merging import Moments, merge


class ChannelMoments(Moments):
    """First two moments of C channels, each over the same `count` values.

    `mean` and `m2` (the sum of squared deviations from the mean) are float64 of shape (C,); other dtypes are converted.
    A count of 0 means that there are no values yet. Merging follows Chan, Golub and LeVeque (1979), so any split of the
    data gives the same moments up to rounding.
    """

    @classmethod
    def _of(cls, found: Moments) -> ChannelMoments:
        """The moments that a backend returned, with the methods of this class; the tensors are shared."""
        return cls(found.count, found.mean, found.m2)

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> ChannelMoments:
        """Moments of no values: merging them changes nothing."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    def to(self, device: torch.device | str) -> ChannelMoments:
        """The same moments on `device`; tensors that are on it already are shared."""
        return ChannelMoments(self.count, self.mean.to(device), self.m2.to(device))

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Moments of both sets of values together, as a new object on the device of `self`.

        Raises ValueError when C differs.
        """
        return ChannelMoments._of(merge(self, other)[0])

    @classmethod
    def pool(cls, parts: Sequence[ChannelMoments]) -> ChannelMoments:
        """Moments of the values of all parts together, on the device of the first part.

        As merging the parts one by one, in fewer operations. Raises ValueError if there are no parts or C differs.
        """
        if len({part.channels for part in parts}) != 1:
            raise ValueError(f"cannot pool moments of {[part.channels for part in parts]} channels")
        count = sum(part.count for part in parts)
        if len(parts) == 1 or not count:
            return parts[0]
        parts = [part.to(parts[0].mean.device) for part in parts]
        shares = torch.tensor([part.count / count for part in parts], dtype=torch.float64, device="cpu")
        share = shares.to(parts[0].mean.device, non_blocking=True)
        # differences from the first mean: if all values are one constant, the pooled mean equals it to the bit
        steps = torch.stack([part.mean for part in parts]) - parts[0].mean
        step = share @ steps
        between = (share * count) @ (steps - step).square()
        return cls(count, parts[0].mean + step, torch.stack([part.m2 for part in parts]).sum(0) + between)

    def affine(self, gain: Tensor, shift: Tensor) -> ChannelMoments:
        """Moments of gain * x + shift per channel; gain and shift float64 (C,), on the same device."""
        return ChannelMoments(self.count, gain * self.mean + shift, gain.square() * self.m2)

    def update_(self, x: Tensor, channel_dim: int = 1) -> ChannelMoments:
        """Add the values of `x`, shape (N, C, ...), in place; returns self, moved to the device of x.

        Raises the errors of `channel_moments`.
        """
        merged = channel_moments(x, channel_dim, running=self)
        vars(self).update(vars(merged))
        return self


@dataclass(eq=False)
class PairedMoments:
    """Moments of two tensors of one shape, and the co-moment of their channels.

    `comoment` is sum((d - mean_d) * (p - mean_p)), float64 (C,), over the same `count` values as the moments.
    """

    dense: ChannelMoments
    pruned: ChannelMoments
    comoment: Tensor

    @property
    def cov(self) -> Tensor:
        """Population covariance, float64 (C,); NaN while there are no values."""
        return self.comoment / self.dense.count if self.dense.count else torch.full_like(self.comoment, torch.nan)

    @property
    def corr(self) -> Tensor:
        """Pearson correlation, float64 (C,); 0 where either channel is constant."""
        scale = (self.dense.m2 * self.pruned.m2).sqrt()
        return torch.where(scale == 0, 0.0, self.comoment / scale).clamp(-1.0, 1.0)

    def merge(self, other: PairedMoments) -> PairedMoments:
        """Paired moments of both sets of values together, as a new object on the device of `self`."""
        dense, step_dense, weight = merge(self.dense, other.dense)
        pruned, step_pruned, _ = merge(self.pruned, other.pruned)
        theirs = other.comoment.to(self.comoment.device)
        if weight:
            comoment = self.comoment + theirs + step_dense * step_pruned * weight
        else:
            comoment = (self.comoment if self.dense.count else theirs).clone()
        return PairedMoments(ChannelMoments._of(dense), ChannelMoments._of(pruned), comoment)


def channel_moments(
    x: Tensor, channel_dim: int = 1, *, running: ChannelMoments | None = None, tolerance: float = 1e-6
) -> ChannelMoments:
    """Count, mean and sum of squared deviations of every channel of `x`, over all its other dimensions.

    `x`: float16, bfloat16, float32 or float64, any strides, not empty. The moments are float64 (C,) on the device of x.
    Half precision is summed in float32. Every sum is shifted or checked for cancellation, so the variance stays
    accurate at a mean of 1e4 standard deviations.

    `running`: moments of earlier values, merged with those of x; from another device they are moved.
    `tolerance`: relative error of the variance up to which the check accepts plain sums; a larger tolerance can save
    the torch backend a second pass.

    Raises ValueError for an empty tensor, a missing dimension or a different C, TypeError for another dtype.
    """
    eager.check(x, channel_dim)
    if running is not None and running.channels != x.shape[channel_dim]:
        raise ValueError(f"moments of {running.channels} and of {x.shape[channel_dim]} channels do not merge")
    if running is not None and running.mean.device != x.device:
        running = running.to(x.device)
    if torch.compiler.is_compiling():
        count = x.numel() // x.shape[channel_dim]
        found = ChannelMoments(count, *compiled.channel_moments(x, channel_dim, tolerance))
        return found if running is None else running.merge(found)
    return ChannelMoments._of(eager.channel_moments(x, channel_dim, tolerance, running))


def paired_moments(dense: Tensor, pruned: Tensor, channel_dim: int = 1) -> PairedMoments:
    """Moments of two tensors of one shape, dtype and device, and their covariance, in one pass over both.

    Shapes, dtypes and errors as for `channel_moments`; also ValueError where the two tensors differ.
    """
    eager.check(dense, channel_dim)
    eager.check(pruned, channel_dim)
    if (dense.shape, dense.dtype, dense.device) != (pruned.shape, pruned.dtype, pruned.device):
        raise ValueError(
            "paired moments need one shape, dtype and device, "
            f"not {tuple(dense.shape)} {dense.dtype} on {dense.device} and "
            f"{tuple(pruned.shape)} {pruned.dtype} on {pruned.device}"
        )
    measure = compiled.paired_moments if torch.compiler.is_compiling() else eager.paired_moments
    mean_d, m2_d, mean_p, m2_p, comoment = measure(dense, pruned, channel_dim)
    count = dense.numel() // dense.shape[channel_dim]
    return PairedMoments(ChannelMoments(count, mean_d, m2_d), ChannelMoments(count, mean_p, m2_p), comoment)
