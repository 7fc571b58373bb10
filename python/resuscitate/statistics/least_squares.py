"""Ridge regression of a layer's outputs on its input patches, from moments; each output channel has its own support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from asr_kernels import PatchMoments, RowMoments

from ..runtime.distributed import Ranks
from .conjugate_gradients import CoupledSystem, RidgeSystems, Solution
from .second_moments import Matrices, Rows

# Conjugate gradients: up to this excess of the squared residuals over their least sum, as a part of the targets' sum of
# squares; with this ridge or more, which bounds the number of steps. On a CPU: for layers with this many weights per
# channel or more, and supports of this density or more, where the steps take less time than factors for three targets;
# ROWS channels at a time, so that the solution does not depend on the number of ranks. On a GPU: for all layers, all
# groups at a time.
EXCESS, LEAST_RIDGE, LEAST_VALUES, LEAST_DENSITY, ROWS, MOST_ROWS = 1e-7, 1e-3, 256, 0.14, 64, 1024
KEPT_BYTES = 256 << 20  # the most memory for factors that are kept


@dataclass
class Targets:
    """The target outputs: sums of products of deviations, with inputs (O, K) and with themselves (O,); means (O,)."""

    cross: Tensor
    squares: Tensor
    mean: Tensor


class Problem:
    """The least-squares problem of one layer: moments of its inputs, present weights, support and ridge strength.

    With G groups, O output channels and K weights per channel: weight and support (O, K), with weights outside of the
    support ignored; xx: the sums of products of the inputs' deviations; rho (O,), the ridge times the mean diagonal of
    xx. ridge: a number or (O,). present: the weights as a `Solution`. direct: factor every matrix. missed: how many
    channels conjugate gradients did not solve for to `EXCESS` so far. curvature (O, O): see `solve`.
    """

    def __init__(
        self,
        moments: PatchMoments | RowMoments,
        weight: Tensor,
        support: Tensor,
        ridge: float | Tensor,
        ranks: Ranks,
        direct: bool = False,
        curvature: Tensor | None = None,
    ) -> None:
        self.moments, self.support, self.ranks, self.direct = moments, support, ranks, direct
        self.curvature = curvature
        self.xx = Rows(moments) if isinstance(moments, RowMoments) else Matrices(moments.xx)
        self._present, channels, groups = weight.double() * support, len(weight), self.xx.groups
        self.group = torch.arange(channels, device=weight.device) // (channels // groups)
        self.diagonal = moments.diagonal
        ridges = ridge if isinstance(ridge, Tensor) else torch.full_like(self.group, ridge, dtype=torch.float64)
        self.ridge = ridges.expand(channels)
        self.rho, self.varies = self.diagonal.mean(1)[self.group] * self.ridge, (self.diagonal != 0).any(1)
        self.missed = torch.zeros((), dtype=torch.int64, device=weight.device)
        self._kept: list[_Factored] = []

    def targets(self, xy: Tensor, yy: Tensor, y: Tensor | None = None) -> Targets:
        """Targets from sums over the samples.

        xy, yy: sums of products of the inputs less their means, and of the outputs less `moments.target`.
        y: sum of the outputs less `moments.target`; None: 0.
        """
        count = max(self.moments.count, 1)
        offset = torch.zeros_like(yy) if y is None else y / count
        squares, mean = yy - count * offset.square(), self.moments.target + offset
        return Targets(xy.mT.reshape(self.support.shape), squares.view(-1), mean.view(-1))

    def own_targets(self) -> Targets:
        """The targets in the moments."""
        return self.targets(self.moments.xy, self.moments.yy)

    def solve(self, targets: Targets, start: Solution | None = None, excess: float = EXCESS) -> Solution:
        """The weights (O, K) by ridge regression towards the present weights; the present ones if no input varies.

        start: the solution of a similar problem. excess: see `EXCESS`. Both are for conjugate gradients alone.
        With a curvature G, E the errors of the outputs: from there some way towards the least tr(G E E'), in place of
        the least tr(E E'), if the layer has one group whose second moments are a matrix.
        """
        right = torch.addcmul(targets.cross, self.rho[:, None], self.present.w)
        w, product, start = torch.zeros_like(right), torch.zeros_like(right), start or self.present
        allowed = excess * torch.maximum(targets.squares, self.present.squares)
        for (groups, rows), systems in self._systems:
            parts = right, start.w, start.product, allowed, w, product
            wanted, *first, most, new, new_product = (
                each.unflatten(0, (self.xx.groups, -1))[groups, rows] for each in parts
            )
            found, missed = systems.solve(wanted, Solution(*first), most)
            new[:], new_product[:] = found.w, found.product
            if isinstance(self.xx, Matrices):  # factors of a matrix from few samples would take too long
                self.missed = self.missed + missed
        for factored in self._factored():
            factored.solve(right, w)
            own = factored.rows.flatten()
            product[own] = (right[own] - self.rho[own, None] * w[own]) * self.support[own]
        w, product = self.ranks.add(w), self.ranks.add(product)
        varies = self.varies[self.group, None]
        found = Solution(torch.where(varies, w, self.present.w), torch.where(varies, product, 0.0))
        return found if self.curvature is None else self._coupled(found, targets, self.curvature)

    def _coupled(self, found: Solution, targets: Targets, curvature: Tensor) -> Solution:
        if self.xx.groups > 1 or not isinstance(self.xx, Matrices):
            return found
        system = CoupledSystem(self.xx, self.diagonal[0], curvature.double(), self.rho[:, None], self.support)
        return self.with_weights(self.ranks.first(system.approach(targets.cross, self.present.w, found.w)))

    @cached_property
    def present(self) -> Solution:
        """The present weights."""
        return self.with_weights(self._present)

    def with_weights(self, w: Tensor) -> Solution:
        """Weights w (O, K) with their products."""
        return Solution(w, self.xx.times(w.unflatten(0, (self.xx.groups, -1))).flatten(0, 1))

    @property
    def _on_cpu(self) -> bool:
        return self.support.device.type == "cpu"

    @cached_property
    def _sizes(self) -> list[int]:
        return self.support.sum(1).tolist()

    @cached_property
    def _same_matrix(self) -> list[dict[tuple[bytes, float], list[int]]]:
        """For each group its channels by support and ridge: those of one list share a matrix."""
        supports = [row.tobytes() for row in np.packbits(self.support.cpu().numpy(), axis=1)]
        ridges = self.ridge.tolist()
        found: list[dict[tuple[bytes, float], list[int]]] = [{} for _ in range(self.xx.groups)]
        for channel, group in enumerate(self.group.tolist()):
            found[group].setdefault((supports[channel], ridges[channel]), []).append(channel)
        return found

    @cached_property
    def _iterative(self) -> list[tuple[slice, slice]]:
        """The channels to solve for by conjugate gradients at a time: groups, and channels of each."""
        (channels, values), groups = self.support.shape, self.xx.groups
        width, by_cost = channels // groups, self._on_cpu and isinstance(self.xx, Matrices)
        if isinstance(self.xx, Matrices) and (self.direct or (by_cost and values < LEAST_VALUES)):
            return []
        size = ROWS if self._on_cpu else MOST_ROWS
        rows = [slice(at, min(at + size, width)) for at in range(0, width, size)]
        if not by_cost:
            return [(slice(0, groups), each) for each in rows]
        least = width * (LEAST_DENSITY * values) ** 2  # squares of sizes, as the time to factor goes
        dense = [sum(self._sizes[same[0]] ** 2 for same in found.values()) > least for found in self._same_matrix]
        return [(slice(group, group + 1), each) for group in range(groups) if dense[group] for each in rows]

    @cached_property
    def _systems(self) -> list[tuple[tuple[slice, slice], RidgeSystems]]:
        """This rank's share of `_iterative`, with the systems, which serve all targets."""
        rho, support = (each.unflatten(0, (self.xx.groups, -1)) for each in (self.rho[:, None], self.support))
        return [
            (at, RidgeSystems(self.xx, at[0], self.diagonal, rho[at], support[at]))
            for at in self._iterative[self.ranks.rank :: self.ranks.size]
        ]

    def _factored(self) -> Iterator[_Factored]:
        """Factors for this rank's share of all other channels; the first of them are kept for the next targets."""
        yield from self._kept
        for index, channels in enumerate(self._unfactored[len(self._kept) :], len(self._kept)):
            factored = self._factor(channels)
            if len(self._kept) == index and sum(each.bytes for each in (*self._kept, factored)) <= KEPT_BYTES:
                self._kept.append(factored)
            yield factored

    @cached_property
    def _unfactored(self) -> list[list[list[int]]]:
        """The channels to solve for directly: batches of systems, each of the channels that share its matrix."""
        iterative = {group for groups, _ in self._iterative for group in range(self.xx.groups)[groups]}
        if len(iterative) == self.xx.groups:
            return []
        systems = [
            each for group, found in enumerate(self._same_matrix) if group not in iterative for each in found.values()
        ]
        assigned = [each for each in systems[self.ranks.rank :: self.ranks.size] if self._sizes[each[0]]]
        single = sorted((each[0] for each in assigned if len(each) == 1), key=self._sizes.__getitem__)
        shared = [[each] for each in assigned if len(each) > 1]
        return shared + [[[channel] for channel in batch] for batch in _batches(single, self._sizes)]

    def _factor(self, channels: Sequence[Sequence[int]]) -> _Factored:
        """Factor xx + rho I on the supports of these channels; those of one inner list have the same."""
        rows = torch.tensor(channels, device=self.support.device)
        first, size = rows[:, 0], max(self._sizes[each[0]] for each in channels)
        support, group = self.support[first], self.group[first]
        # the places of each support, in order, then padding from outside of it
        places = support.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        inside = support.gather(1, places)
        assert isinstance(self.xx, Matrices)
        matrix = self.xx.within(group, places)
        matrix *= inside[:, :, None] & inside[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(inside, self.rho[first, None], 1.0))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        indefinite = failed.nonzero().flatten().tolist()
        inverses = {index: torch.linalg.pinv(matrix[index], hermitian=True, rtol=1e-7) for index in indefinite}
        return _Factored(rows, places, inside, factor, inverses)

    def unexplained(self, found: Solution, targets: Targets) -> Tensor:
        """The sum of squared deviations of the residual, targets less the outputs with these weights, (O,)."""
        return targets.squares - 2 * (found.w * targets.cross).sum(1) + found.squares

    def bias(self, w: Tensor, targets: Targets) -> Tensor:
        """The bias with which the outputs have the mean of the targets, (O,)."""
        return targets.mean - (w * self.moments.mean[self.group]).sum(1)


@dataclass
class _Factored:
    """Cholesky factors (B, n, n) of B systems of up to n equations, each for R channels, the rows (B, R).

    places, inside (B, n): the support, padded with equations 1 x = 0. inverses: by index, the pseudo-inverse (for the
    solution of minimum norm) of a matrix that rounding made indefinite.
    """

    rows: Tensor
    places: Tensor
    inside: Tensor
    factor: Tensor
    inverses: dict[int, Tensor]

    @property
    def bytes(self) -> int:
        """The size of the factors."""
        return self.factor.nbytes

    def solve(self, right: Tensor, w: Tensor) -> None:
        """Write the solutions for right (O, K) into the rows of w (O, K)."""
        index, inside = (self.rows[:, :, None], self.places[:, None, :]), self.inside[:, None, :]
        padded = (right[index] * inside).mT
        found = torch.cholesky_solve(padded, self.factor)
        for system, inverse in self.inverses.items():
            found[system] = inverse @ padded[system]
        w[index] = found.mT * inside


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
