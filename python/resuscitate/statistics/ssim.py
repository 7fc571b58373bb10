"""Structural similarity of a layer's feature maps in two networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.layers import channel_dim
from ..network.runner import check_tensors
from .base import Place, Statistic


class Ssim(Statistic):
    """The mean SSIM over images, channels and places, between the pruned and the dense outputs; see `ssim`."""

    measured = ("sums",)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the similarities, and their number

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        check_tensors(self.place.name, pruned)
        similar = ssim(dense, pruned, channel_dim(self.place.module))
        self.sums += torch.tensor([float(similar.sum()), similar.numel()], dtype=torch.float64)

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
    uniform weights, K1 = 0.01, K2 = 0.03, and L the range of the wanted channel.
    """
    x, y = (t.float().T[None] if t.dim() == 2 else t.float().movedim(axis, 1) for t in (wanted, found))
    places = [0, *range(2, x.dim())]
    spread = x.amax(places, keepdim=True) - x.amin(places, keepdim=True)
    pool: Any = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()]

    def mean(t: Tensor) -> Tensor:
        return pool(t, [min(7, size) for size in t.shape[2:]], stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * spread).square(), (0.03 * spread).square()
    top, bottom = (2 * mx * my + c1) * (2 * cov + c2), (mx * mx + my * my + c1) * (vx + vy + c2)
    return torch.where(bottom > 0, top / bottom, 1.0)
