"""Ridge regression of a layer's outputs on its input patches, from moments; each output channel has its own support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_kernels import PatchMoments

from ..runtime.distributed import Ranks


@dataclass
class Targets:
    """The target outputs: their covariances with the inputs (O, K), variances and means (O,)."""

    cross: Tensor
    variance: Tensor
    mean: Tensor


class Problem:
    """The least-squares problem of one layer: moments of its inputs, present weights, support and ridge strength.

    With G groups, O output channels and K weights per channel: weight, present and support (O, K); c (G, K, K), the
    covariance of the inputs; rho (G,), `ridge` times the mean diagonal of c.
    """

    def __init__(self, moments: PatchMoments, weight: Tensor, support: Tensor, ridge: float, ranks: Ranks) -> None:
        self.moments, self.support, self.ranks = moments, support, ranks
        self.count, channels = max(moments.count, 1), len(weight)
        self.c, self.present = moments.xx / self.count, weight.double() * support
        self.group = torch.arange(channels, device=weight.device) // (channels // len(self.c))
        diagonal = self.c.diagonal(dim1=1, dim2=2)
        self.rho, self.varies = ridge * diagonal.mean(1), (diagonal != 0).any(1)

    def targets(self, xy: Tensor, yy: Tensor, y: Tensor | None = None) -> Targets:
        """Targets from sums over the samples.

        xy, yy: sums of products of the inputs less their means, and of the outputs less `moments.target`.
        y: sum of the outputs less `moments.target`; None: 0.
        """
        offset = torch.zeros_like(yy) if y is None else y / self.count
        variance, mean = yy / self.count - offset.square(), self.moments.target + offset
        return Targets((xy / self.count).mT.reshape(self.present.shape), variance.view(-1), mean.view(-1))

    def own_targets(self) -> Targets:
        """The targets in the moments."""
        return self.targets(self.moments.xy, self.moments.yy)

    def solve(self, targets: Targets) -> Tensor:
        """The weights (O, K) by ridge regression towards the present weights; the present ones if no input varies."""
        right = targets.cross + self.rho[self.group, None] * self.present
        w, sizes = torch.zeros_like(right), self.support.sum(1)
        supports = (row.tobytes() for row in np.packbits(self.support.cpu().numpy(), axis=1))
        same_matrix: dict[tuple[int, bytes], list[int]] = {}
        for channel, key in enumerate(zip(self.group.tolist(), supports, strict=True)):
            same_matrix.setdefault(key, []).append(channel)
        assigned = list(same_matrix.values())[self.ranks.rank :: self.ranks.size]
        for channels in assigned:
            if len(channels) > 1:
                self._solve_same_matrix(channels, right, w)
        single = [channels[0] for channels in assigned if len(channels) == 1]
        for batch in _batches(sorted(single, key=sizes.tolist().__getitem__), sizes.tolist()):
            self._solve_padded(torch.tensor(batch, device=w.device), int(sizes[batch[-1]]), right, w)
        return torch.where(self.varies[self.group, None], self.ranks.add(w), self.present)

    def _solve_same_matrix(self, channels: list[int], right: Tensor, w: Tensor) -> None:
        """Solve (c + rho I) w = right for channels of one group with the same support: one factorisation."""
        group, places = self.group[channels[0]], self.support[channels[0]].nonzero().flatten()
        matrix = self.c[group][places[:, None], places]
        matrix.diagonal().add_(self.rho[group])
        rows = torch.tensor(channels, device=w.device)[:, None]
        w[rows, places] = _cholesky_solve(matrix[None], right[rows, places].mT[None])[0].mT

    def _solve_padded(self, channels: Tensor, size: int, right: Tensor, w: Tensor) -> None:
        """The same for supports of up to `size` places, in one batch padded with the equations 1 x = 0."""
        if not size:
            return
        support, group = self.support[channels], self.group[channels]
        # the places of each support, in order, then padding from outside of it
        places = support.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        inside = support.gather(1, places)
        matrix = self.c[group[:, None, None], places[:, :, None], places[:, None, :]]
        matrix *= inside[:, :, None] & inside[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(inside, self.rho[group, None], 1.0))
        padded = right[channels].gather(1, places) * inside
        w[channels[:, None], places] = _cholesky_solve(matrix, padded[:, :, None])[:, :, 0] * inside

    def variance(self, w: Tensor) -> Tensor:
        """The variance of the outputs with the weights w, (O,)."""
        return ((w.view(len(self.c), -1, w.shape[1]) @ self.c).view(w.shape) * w).sum(1)

    def unexplained(self, w: Tensor, targets: Targets) -> Tensor:
        """The variance of the residual, targets less the outputs with the weights w, (O,)."""
        return targets.variance - 2 * (w * targets.cross).sum(1) + self.variance(w)

    def bias(self, w: Tensor, targets: Targets) -> Tensor:
        """The bias with which the outputs have the mean of the targets, (O,)."""
        return targets.mean - (w * self.moments.mean[self.group]).sum(1)


def _cholesky_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of each system; by the pseudo-inverse (minimum norm) if rounding made the matrix indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right, factor)
    for index in failed.nonzero().flatten().tolist():
        solution[index] = torch.linalg.pinv(matrix[index], hermitian=True, rtol=1e-7) @ right[index]
    return solution


def _batches(channels: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Split channels, sorted by support size, into batches whose padded systems fit into 256 MiB."""
    batch: list[int] = []
    for channel in channels:
        # 24 bytes per element: the matrix, its factor, temporaries of indexing. Padding: at most half of a size, plus 8
        full = (len(batch) + 1) * sizes[channel] ** 2 * 24 > 256 << 20
        if batch and (full or sizes[channel] > 1.5 * sizes[batch[0]] + 8):
            yield batch
            batch = []
        batch.append(channel)
    if batch:
        yield batch
