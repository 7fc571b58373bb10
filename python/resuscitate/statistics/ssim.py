"""Structural similarity of a layer's feature maps in two networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.layers import channel_dim
from ..network.runner import check_finite, check_tensors
from .base import Place, Statistic


class Ssim(Statistic):
    """The mean SSIM over images, channels and places, between the pruned and the dense outputs; see `ssim`."""

    measured = ("sums",)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the similarities, and their number
        self.found: list[tuple[int, Tensor]] = []  # by batch, the sum of the similarities
        self.count = 0

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        check_tensors(self.place.name, pruned)
        similar = ssim(dense, pruned, channel_dim(self.place.module))
        self.found.append((batch, similar.sum(dtype=torch.float64)))
        self.count += similar.numel()

    def finish(self, batches: int) -> None:
        check_finite(self.place.name, self.found)
        total = float(torch.stack([each for _, each in self.found]).sum()) if self.found else 0.0
        self.sums = torch.tensor([total, self.count], dtype=torch.float64)

    @property
    def dissimilarity(self) -> float:
        """1 - SSIM, from 0 to 1; 0 where nothing was measured."""
        found, count = self.sums.tolist()
        return min(max(1 - found / count, 0.0), 1.0) if count else 0.0

    @property
    def empty(self) -> bool:
        return not self.sums[1]


def ssim(wanted: Tensor, found: Tensor, axis: int) -> Tensor:
    """Structural similarity, float32, one for each window, image and channel (Wang et al. 2004, equation 13).

    wanted, found: of one shape, (N, C, H, W) or with other spatial axes, the channels on `axis`; without spatial axes,
    (N, C), the images are the places of one map. Windows of 7 along each spatial axis, or the whole of a shorter axis;
    uniform weights, K1 = 0.01, K2 = 0.03, and L the range of the wanted channel. Where that is 0: 1 for windows that
    are equal, else 0. NaN or infinite values give NaN.
    """
    x, y = (t.float().T[None] if t.dim() == 2 else t.float().movedim(axis, 1) for t in (wanted, found))
    places = [0, *range(2, x.dim())]
    spread = x.amax(places, keepdim=True) - x.amin(places, keepdim=True)
    pool: Any = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()]

    def mean(t: Tensor) -> Tensor:
        return pool(t, [min(7, size) for size in t.shape[2:]], stride=1)

    # about the mean of each channel: squares of means far above the spread would hide it
    ax, ay = (t.mean(places, keepdim=True) for t in (x, y))
    dx, dy = x - ax, y - ay
    ex, ey = mean(dx), mean(dy)
    vx, vy, cov = mean(dx * dx) - ex * ex, mean(dy * dy) - ey * ey, mean(dx * dy) - ex * ey
    mx, my = ax + ex, ay + ey
    c1, c2 = (0.01 * spread).square(), (0.03 * spread).square()
    top, bottom = (2 * mx * my + c1) * (2 * cov + c2), (mx * mx + my * my + c1) * (vx + vy + c2)
    return torch.where(spread == 0, (mean((x - y).abs()) == 0).float(), top / bottom)
