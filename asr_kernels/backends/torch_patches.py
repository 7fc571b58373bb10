"""Products of convolution patches by rows of taps: the input is copied once for each tap along all axes but the first.

Two kernel taps that lie one stride apart along the first spatial axis read the same rows, except one row at each end.
So most of the products follow from earlier ones by adding one row and subtracting one: a 3x3 kernel at stride 1
computes 3 of 9 products of rows. The least arithmetic and memory, for a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..window import Window

BLOCK = 128  # rows of a matrix of products within which both triangles are computed
Pair = tuple[int, int]  # of taps along the first spatial axis, the second one not before the first


@dataclass
class Chunk:
    """Sums over the patches of a chunk of images, float64: of deviations of inputs and outputs from given points.

    about, x (G, K): the points, and the sums, of the values of a patch; target, y (G, O): of the outputs.
    """

    count: int
    about: Tensor
    x: Tensor
    target: Tensor
    y: Tensor


@dataclass
class Totals:
    """Sums of products of deviations over the chunks of a fold, float64. A window has `taps` rows of R values.

    xx: for each pair of taps the products (G, C * R, C * R) of what they read, less those of the pair one stride
    earlier; of a tap with itself, above the diagonal blocks alone. xy (taps, G, C * R, O): with the outputs. yy (G, O):
    squares of the outputs. chunks: of each 2 (K + O) values for each group.
    """

    xx: dict[Pair, Tensor]
    xy: Tensor
    yy: Tensor
    chunks: list[Chunk]


class Sums:
    """Sums of products of patches and outputs, by fold.

    Products of deviations from the means of a chunk of images are summed in float32, or in float64 for float64. Chunks
    are added in float64, in place. What the distances between their means add follows at the end, for all chunks at
    once: so the result depends on the chunks, and not on their order but for the rounding of float64.
    """

    def __init__(self, x: Tensor, y: Tensor, window: Window, dtype: torch.dtype | None = None) -> None:
        self.window, self.taps, self.R = window, window.kernel[0], prod(window.kernel[1:])
        self.C, self.O = x.shape[1] // window.groups, y.shape[1] // window.groups
        self.dtype = dtype or (torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32)
        self.folds: dict[int, Totals] = {}

    def add(self, x: Tensor, y: Tensor, folds: Mapping[int, Tensor | None], budget: int) -> None:
        """Add a batch. folds: of each, which images belong to it, int64; None: all. budget: bytes for copies."""
        places = prod(n + sum(pad) for n, pad in zip(x.shape[2:], self.window.padding, strict=True))
        copied = self.R * self.dtype.itemsize * x.shape[1] * places  # of an image
        most = max(budget // max(copied, 1), 1)
        for fold, rows in folds.items():
            if fold not in self.folds:
                self.folds[fold] = self._nothing(x.device)
            mine = (each if rows is None else each[rows.to(each.device, non_blocking=True)] for each in (x, y))
            for parts in zip(*(each.split(most) for each in mine), strict=True):
                self.folds[fold].chunks.append(self._add(self.folds[fold], *parts))

    def moments(self, fold: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The parts of `PatchMoments` of a fold, whose sums are freed."""
        G, K, totals = self.window.groups, self.C * self.taps * self.R, self.folds.pop(fold)
        count = sum(chunk.count for chunk in totals.chunks)
        n = torch.tensor([[chunk.count] for chunk in totals.chunks], dtype=torch.float64)
        n = n.to(totals.yy.device, non_blocking=True)
        x, mean, far = _about_mean([(chunk.about, chunk.x) for chunk in totals.chunks], n)
        y, target, off = _about_mean([(chunk.target, chunk.y) for chunk in totals.chunks], n)
        half, xy = x + n * far / 2, totals.xy.unflatten(2, (self.C, self.R)).movedim(0, 2).reshape(G, K, -1)
        return (
            count,
            mean,
            target,
            self._products(totals.xx).view(G, K, K).baddbmm_(half.mT, far).baddbmm_(far.mT, half),
            xy.baddbmm_(x.mT, off).baddbmm_(far.mT, y + n * off),
            (totals.yy + (off * (2 * y + n * off)).sum(1)).clamp(min=0),
        )

    def _nothing(self, device: torch.device) -> Totals:
        G, CR = self.window.groups, self.C * self.R

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        xx = {(i, j): zeros(G, CR, CR) for i in range(self.taps) for j in range(i, self.taps)}
        return Totals(xx, zeros(self.taps, G, CR, self.O), zeros(G, self.O), [])

    def _add(self, totals: Totals, x: Tensor, y: Tensor) -> Chunk:
        """Add the products of a chunk to the totals; its sums are returned."""
        G, rows = self.window.groups, y.shape[2]
        deviations, about = self._centred(padded(x, self.window))
        wanted, target = self._centred(y)
        # one contiguous row for each value of a row of taps and for each output, which PyTorch multiplies faster
        columns = self._columns(deviations)
        outputs = wanted.transpose(0, 1).transpose(1, 2).reshape(G, self.O, -1)
        for i in range(self.taps):
            read = self._read(columns, i, 0, rows)
            totals.xy[i] += read @ outputs.mT
            for j in range(i, self.taps):
                if before := self._before((i, j)):
                    totals.xx[i, j] += self._ends(columns, (i, j), before, rows)
                elif i == j:
                    _add_squares(totals.xx[i, i], read)
                else:
                    totals.xx[i, j] += read @ self._read(columns, j, 0, rows).mT
        totals.yy += torch.linalg.vector_norm(outputs, dim=2).double().square()
        by_row = columns.sum(-1).double()
        sums = torch.stack([by_row[:, :, self._rows(i, 0, rows)].sum(-1) for i in range(self.taps)], -1)
        # [G, C * R, taps] -> [G, K]
        x_sums = sums.unflatten(1, (self.C, self.R)).mT.reshape(G, -1)
        about = about.view(G, -1).repeat_interleave(self.taps * self.R, 1)
        return Chunk(len(y) * prod(y.shape[2:]), about, x_sums, target.view(G, -1), outputs.sum(2).double())

    def _ends(self, columns: Tensor, last: Pair, first: Pair, rows: int) -> Tensor:
        """Products of what a pair of taps reads for the last row of the output, less another pair's for the first."""
        a, b, c, d = (self._read(columns, tap, row, 1) for pair, row in ((last, rows - 1), (first, 0)) for tap in pair)
        return (a @ b.mT).baddbmm_(c, d.mT, alpha=-1)

    def _products(self, pairs: Mapping[Pair, Tensor]) -> Tensor:
        """[G, C, taps, R, C, taps, R]: products of what all taps read."""
        sizes = self.window.groups, self.C, self.taps, self.R, self.C, self.taps, self.R
        found = next(iter(pairs.values())).new_empty(sizes)
        for (i, j), products in pairs.items():
            before = self._before((i, j))
            if i == j and not before:
                _mirror(products)
            block = found[:, :, i, :, :, j]
            block.copy_(products.view(block.shape))
            if before:
                block += found[:, :, before[0], :, :, before[1]]
            if i != j:
                found[:, :, j, :, :, i] = block.permute(0, 3, 4, 1, 2)
        return found

    def _before(self, pair: Pair) -> Pair | None:
        """The pair of taps one stride earlier: it reads the same rows, except its first and the last of this pair."""
        (i, j), step = pair, self.window.stride[0]
        steps, left = divmod(step, self.window.dilation[0])
        return None if left or i < steps else (i - steps, j - steps)

    def _centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each channel minus its mean; and the mean, float64 (C,)."""
        x = x.to(self.dtype)
        mean = x.mean([0, *range(2, x.ndim)])
        return x - mean.view(-1, *[1] * (x.ndim - 2)), mean.double()

    def _columns(self, x: Tensor) -> Tensor:
        """[G, C * R, rows, M]: each channel, copied for each of the R taps along all axes but the first.

        `rows` are rows of the padded input x; M runs over images and the other output axes.
        """
        values = patch_values(x, self.window, axes=range(1, len(self.window.kernel)))  # [C, *taps, N, rows, *others]
        others = len(self.window.kernel) - 1
        copies = values.movedim(others + 2, others + 1)
        return copies.reshape(self.window.groups, self.C * self.R, copies.shape[others + 1], -1)

    def _rows(self, tap: int, first: int, count: int) -> slice:
        """The rows of the padded input that a tap reads for `count` rows of the output."""
        step = self.window.stride[0]
        start = tap * self.window.dilation[0] + first * step
        return slice(start, start + (count - 1) * step + 1, step)

    def _read(self, columns: Tensor, tap: int, first: int, count: int) -> Tensor:
        # [G, C * R, count * M]
        return columns[:, :, self._rows(tap, first, count)].flatten(2)


def _about_mean(chunks: list[tuple[Tensor, Tensor]], n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (G, V) of the values of all chunks, from the points and the sums of deviations of each, (G, V).

    n (B, 1): how many values. Also returns the sums, and the distances of the points from the mean, (G, B, V).
    """
    points, sums = (torch.stack(each, 1) for each in zip(*chunks, strict=True))
    mean = points[:, 0] + (n * (points - points[:, :1]) + sums).sum(1) / n.sum()
    return sums, mean, points - mean[:, None]


def _add_squares(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows (G, n, M) with each other to (G, n, n): of each `BLOCK` rows from its first one on."""
    for start in range(0, rows.shape[1], BLOCK):
        total[:, start : start + BLOCK, start:] += rows[:, start : start + BLOCK] @ rows[:, start:].mT


def _mirror(products: Tensor) -> None:
    """Copy what is above the diagonal blocks of (G, n, n) to below."""
    for start in range(BLOCK, products.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        products[:, block, :start] = products[:, :start, block].mT


def patch_values(x: Tensor, window: Window, axes: Iterable[int] | None = None) -> Tensor:
    """A view [C, *taps, N, *places] of padded inputs x: the values that the taps along some axes read, by place.

    axes: of the window, all by default; along the others the places are those of the input.
    """
    axes = range(len(window.kernel)) if axes is None else axes
    for axis in axes:
        span = (window.kernel[axis] - 1) * window.dilation[axis] + 1
        x = x.unfold(2 + axis, span, window.stride[axis])[..., :: window.dilation[axis]]
    dims = 2 + len(window.kernel)
    return x.permute(1, *range(dims, x.ndim), 0, *range(2, dims))


def padded(x: Tensor, window: Window) -> Tensor:
    """The input with the padding of the window."""
    pads = [pad for pair in reversed(window.padding) for pad in pair]
    return F.pad(x, pads, window.mode) if any(pads) else x
