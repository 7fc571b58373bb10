"""Second moments of a linear layer's inputs and outputs where there are fewer samples than inputs: the samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .patches import PatchMoments


@dataclass(eq=False)
class RowMoments:
    """What `asr_kernels.PatchMoments` says about a linear layer of K inputs and O outputs, as n rows.

    `count`: number of samples. `mean` (1, K) and `target` (1, O): means, float64. x (n, K) and y (n, O), float32 or
    float64, and scale (n,), float64: x' diag(scale) x is the sum of products of deviations of the inputs, and so on.
    `most`: with more rows than this the moments become matrices when they are merged.
    """

    count: int
    mean: Tensor
    target: Tensor
    x: Tensor
    y: Tensor
    scale: Tensor
    most: int

    def merge(self, other: RowMoments | PatchMoments) -> RowMoments | PatchMoments:
        """Moments of both sets of samples; as matrices where the rows are more than `most`."""
        if not isinstance(other, RowMoments) or len(self.x) + len(other.x) > self.most:
            return self.matrices().merge(other)  # type: ignore[arg-type]
        count = self.count + other.count
        share = other.count / max(count, 1)
        return self._with(other, count, share, 1.0, self.count * share)

    def without(self, other: RowMoments) -> RowMoments:
        """The inverse of `merge`: moments of these samples without the others, which must be some of them."""
        count = self.count - other.count
        share = -other.count / max(count, 1)
        return self._with(other, count, share, -1.0, self.count * share)

    def _with(self, other: RowMoments, count: int, share: float, sign: float, weight: float) -> RowMoments:
        dx, dy = other.mean - self.mean, other.target - self.target
        x, y = (torch.cat([a, b, d.to(a.dtype)]) for a, b, d in ((self.x, other.x, dx), (self.y, other.y, dy)))
        scale = torch.cat([self.scale, sign * other.scale, self.scale.new_full((1,), weight)])
        return RowMoments(count, self.mean + dx * share, self.target + dy * share, x, y, scale, self.most)

    def matrices(self) -> PatchMoments:
        """The same as matrices."""
        return PatchMoments(self.count, self.mean, self.target, self.xx, self.xy, self.yy)

    def of_channels(self, groups: Tensor, rows: Tensor) -> RowMoments:
        """The moments with some of the outputs alone, rows (1, R)."""
        target, y = self.target[groups, rows], self.y[:, rows[0]]
        return RowMoments(self.count, self.mean, target, self.x, y, self.scale, self.most)

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of `xx`, (1, K)."""
        return (self.scale[:, None] * self.x.double().square()).sum(0)[None]

    @property
    def xx(self) -> Tensor:
        """The matrix (1, K, K) of `PatchMoments`."""
        x = self.x.double()
        return ((x.mT * self.scale) @ x)[None]

    @property
    def xy(self) -> Tensor:
        """The matrix (1, K, O) of `PatchMoments`."""
        return ((self.x.double().mT * self.scale) @ self.y.double())[None]

    @property
    def yy(self) -> Tensor:
        """The sums of squares (1, O) of `PatchMoments`."""
        return (self.scale[:, None] * self.y.double().square()).sum(0).clamp(min=0)[None]


def row_moments(x: Tensor, y: Tensor, most: int) -> RowMoments:
    """The moments of inputs x (..., K) and target outputs y (..., O) of a linear layer; `most` as in `RowMoments`."""
    (mean, x), (target, y) = map(_deviations, (x, y))
    return RowMoments(len(x), mean, target, x, y, torch.ones(len(x), dtype=torch.float64, device=x.device), most)


def _deviations(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (1, C) of x (..., C), float64, and the deviations (n, C), float32 (float64 for float64)."""
    rows = x.reshape(-1, x.shape[-1]).double()
    mean = rows.sum(0, keepdim=True) / max(len(rows), 1)
    return mean, (rows - mean).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
