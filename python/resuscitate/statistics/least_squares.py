"""Ridge regression of a layer's outputs on patches of its inputs, each channel on its own support, from moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_kernels import PatchMoments

from ..runtime.distributed import Ranks

# padded systems are solved together as long as they take no more than this
SOLVE_BYTES = 256 << 20


@dataclass
class Targets:
    """Wanted outputs: covariances with the inputs (O, K), variances and means (O,)."""

    cross: Tensor
    variance: Tensor
    mean: Tensor


class Problem:
    """The inputs and the present weights of a layer to be fitted to some targets or other."""

    def __init__(self, moments: PatchMoments, weight: Tensor, support: Tensor, ridge: float, ranks: Ranks) -> None:
        self.moments, self.support, self.ranks = moments, support, ranks
        self.count, channels = max(moments.count, 1), len(weight)
        self.c, self.present = moments.xx / self.count, weight.double() * support
        self.group = torch.arange(channels, device=weight.device) // (channels // len(self.c))
        diagonal = self.c.diagonal(dim1=1, dim2=2)
        self.rho, self.moves = ridge * diagonal.mean(1), (diagonal != 0).any(1)

    def targets(self, xy: Tensor, yy: Tensor, y: Tensor | None = None) -> Targets:
        """Sums of products about the means of the inputs and, short of them by `y` in all, of the outputs."""
        short = torch.zeros_like(yy) if y is None else y / self.count
        variance, mean = yy / self.count - short.square(), self.moments.target + short
        return Targets((xy / self.count).mT.reshape(self.present.shape), variance.view(-1), mean.view(-1))

    def own_targets(self) -> Targets:
        """Those of the moments."""
        return self.targets(self.moments.xy, self.moments.yy)

    def solve(self, targets: Targets) -> Tensor:
        """The weights (O, K) by ridge regression; the present ones where the inputs do not vary."""
        right = targets.cross + self.rho[self.group, None] * self.present
        systems = _Systems(self.c, self.rho, self.group, self.support, right)
        found = self.ranks.add(systems.solutions(self.ranks.rank, self.ranks.size))
        return torch.where(self.moves[self.group, None], found, self.present)

    def variance(self, w: Tensor) -> Tensor:
        """Of the outputs that these weights make, (O,)."""
        return ((w.view(len(self.c), -1, w.shape[1]) @ self.c).view(w.shape) * w).sum(1)

    def unexplained(self, w: Tensor, targets: Targets) -> Tensor:
        """The variance of the targets less the outputs that these weights make, (O,)."""
        return targets.variance - 2 * (w * targets.cross).sum(1) + self.variance(w)

    def bias(self, w: Tensor, targets: Targets) -> Tensor:
        """What brings the mean of the outputs to that of the targets, (O,)."""
        return targets.mean - (w * self.moments.mean[self.group]).sum(1)


@dataclass
class _Systems:
    """For each channel, (c + rho I) w = right on its support; c (G, K, K), rho (G,), group (O,), the others (O, K)."""

    c: Tensor
    rho: Tensor
    group: Tensor
    support: Tensor
    right: Tensor

    def solutions(self, part: int, parts: int) -> Tensor:
        """w, (O, K), zero outside of the supports, and for all channels that are not in this part of the work."""
        w = torch.zeros_like(self.right)
        alike: dict[tuple[int, bytes], list[int]] = {}
        for channel, (group, bits) in enumerate(zip(self.group.tolist(), self._bits(), strict=True)):
            alike.setdefault((group, bits), []).append(channel)
        mine = list(alike.values())[part::parts]
        alone = [channels[0] for channels in mine if len(channels) == 1]
        for channels in mine:
            if len(channels) > 1:
                self._solve_alike(channels, w)
        sizes = self.support.sum(1)
        for batch in _batches(sorted(alone, key=sizes.tolist().__getitem__), sizes.tolist()):
            self._solve_padded(torch.tensor(batch, device=w.device), int(sizes[batch[-1]]), w)
        return w

    def _bits(self) -> list[bytes]:
        return [row.tobytes() for row in np.packbits(self.support.cpu().numpy(), axis=1)]

    def _solve_alike(self, channels: list[int], w: Tensor) -> None:
        group, places = self.group[channels[0]], self.support[channels[0]].nonzero().flatten()
        matrix = self.c[group][places[:, None], places]
        matrix.diagonal().add_(self.rho[group])
        rows = torch.tensor(channels, device=w.device)[:, None]
        w[rows, places] = _cholesky_solve(matrix[None], self.right[rows, places].mT[None])[0].mT

    def _solve_padded(self, channels: Tensor, size: int, w: Tensor) -> None:
        """Supports of up to `size` places, filled up with equations that say 1 x = 0."""
        if not size:
            return
        support = self.support[channels]
        # the places of each support, in order, and then some outside of it
        places = support.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        real = support.gather(1, places)
        group = self.group[channels]
        matrix = self.c[group[:, None, None], places[:, :, None], places[:, None, :]]
        matrix *= real[:, :, None] & real[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(real, self.rho[group, None], 1.0))
        right = self.right[channels].gather(1, places) * real
        solved = _cholesky_solve(matrix, right[:, :, None])[:, :, 0]
        w[channels[:, None], places] = solved * real


def _cholesky_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of each system; the least one, by eigenvalues, where rounding has left a matrix indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right, factor)
    for index in failed.nonzero().flatten().tolist():
        solution[index] = torch.linalg.pinv(matrix[index], hermitian=True, rtol=1e-7) @ right[index]
    return solution


def _batches(channels: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Runs of channels, which come in the order of their sizes, whose padded matrices fit `SOLVE_BYTES`."""
    batch: list[int] = []
    for channel in channels:
        # a third for the factor, a third for what indexing makes on the way; no more padding than a half
        full = (len(batch) + 1) * sizes[channel] ** 2 * 24 > SOLVE_BYTES
        if batch and (full or sizes[channel] > 1.5 * sizes[batch[0]] + 8):
            yield batch
            batch = []
        batch.append(channel)
    if batch:
        yield batch
