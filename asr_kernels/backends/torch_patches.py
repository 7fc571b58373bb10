"""Products of convolution patches by rows of taps: the input is copied once for each tap along all axes but the first.

Two kernel taps that lie one stride apart along the first spatial axis read the same rows, except one row at each end.
So most of the products follow from earlier ones by adding one row and subtracting one: a 3x3 kernel at stride 1
computes 3 of 9 products of rows. The least arithmetic and memory, for a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..window import Window

BLOCK = 128  # rows of a matrix of products within which both triangles are computed


class PatchProducts:
    """Sums over the patches of one batch: deviations of inputs and outputs about given points, and their products.

    A window has `taps` rows of R values per channel; a row of the output is a row of patches. All results are float64;
    products are summed in float32, or in float64 for float64.
    `shift` (C,) and `target` (O,): the points, near the means. `left` and `squares` (O,): sums of the deviations of the
    outputs and of their squares.
    """

    def __init__(self, x: Tensor, y: Tensor, window: Window) -> None:
        self.window, self.channels = window, x.shape[1] // window.groups
        # [G, C * R, input rows, M]
        self._columns, self.shift = _columns(x, window)
        wanted, self.target = _centred(y)
        self._rows, self._count = y.shape[2], len(y) * prod(y.shape[2:])
        # [G, O, output rows * M]: one contiguous row for each output, which PyTorch adds faster
        self._wanted = wanted.transpose(0, 1).transpose(1, 2).reshape(window.groups, y.shape[1] // window.groups, -1)
        self.left = self._wanted.sum(2).double().flatten()  # 0 but for rounding
        self.squares = torch.linalg.vector_norm(self._wanted, dim=2).double().square().flatten()

    @staticmethod
    def copied_bytes(x: Tensor, window: Window) -> int:
        """Bytes of the copies for one image."""
        copies = prod(window.kernel[1:]) * max(x.element_size(), 4)
        return copies * x.shape[1] * prod(n + sum(pad) for n, pad in zip(x.shape[2:], window.padding, strict=True))

    def moments(self) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The parts of `PatchMoments`."""
        G, C, taps = self.window.groups, self.channels, self.window.kernel[0]
        R, count = prod(self.window.kernel[1:]), self._count
        K = C * taps * R
        xy = torch.stack([self.with_outputs(i) for i in range(taps)], dim=2).view(G, K, -1)
        sums, left = self.sums().reshape(G, K), self.left.view(G, -1)
        shift = self.shift.view(G, C, 1).expand(-1, -1, taps * R).reshape(G, K)
        return (
            count,
            sums / count + shift,
            self.target.view(G, -1) + left / count,
            self._products().view(G, K, K).baddbmm_(sums[:, :, None], sums[:, None, :], alpha=-1 / count),
            xy.baddbmm_(sums[:, :, None], left[:, None, :], alpha=-1 / count),
            (self.squares.view(G, -1) - left.square() / count).clamp(min=0),
        )

    def _products(self) -> Tensor:
        """[G, C, taps, R, C, taps, R]: products of what all taps read."""
        G, C, taps, R = self.window.groups, self.channels, self.window.kernel[0], prod(self.window.kernel[1:])
        step, hop = self.window.stride[0], self.window.dilation[0]
        xx = self.left.new_empty(G, C, taps, R, C, taps, R)
        blocks: dict[tuple[int, int], Tensor] = {}
        for i in range(taps):
            for j in range(i, taps):
                before = (i * hop - step) / hop
                if before >= 0 and before == int(before) and self._rows > 2:
                    # the pair of taps one stride earlier reads the same rows, except its first and this pair's last
                    a, b = int(before), int(before) + j - i
                    # in place: new memory costs more than the sums
                    blocks[i, j] = self.of_ends((i, j), (a, b)).add_(blocks[a, b])
                else:
                    blocks[i, j] = self.of_rows(i, j)
                xx[:, :, i, :, :, j] = blocks[i, j]
                if i != j:
                    xx[:, :, j, :, :, i] = blocks[i, j].permute(0, 3, 4, 1, 2)
        return xx

    def sums(self) -> Tensor:
        """[G, C, taps, R]: sums of the deviations that a tap reads."""
        by_row = self._columns.sum(-1).double()
        rows = torch.stack([by_row[:, :, self._slice(i, 0, self._rows)].sum(-1) for i in range(self.window.kernel[0])])
        return rows.movedim(0, -1).unflatten(1, (self.channels, -1)).transpose(2, 3)

    def of_rows(self, i: int, j: int) -> Tensor:
        """[G, C, R, C, R]: products of what taps i and j read."""
        mine = self._read(i, 0, self._rows)
        return self._by_channel(_with_itself(mine) if i == j else mine @ self._read(j, 0, self._rows).mT)

    def of_ends(self, last: tuple[int, int], first: tuple[int, int]) -> Tensor:
        """As `of_rows`, of two taps and the last row of the output, minus those of two other taps and the first row."""
        a, b, c, d = (self._read(tap, row, 1) for taps, row in ((last, self._rows - 1), (first, 0)) for tap in taps)
        return self._by_channel((a @ b.mT).baddbmm_(c, d.mT, alpha=-1))

    def with_outputs(self, i: int) -> Tensor:
        """[G, C, R, O]: products of what tap i reads, with the outputs."""
        return (self._read(i, 0, self._rows) @ self._wanted.mT).double().unflatten(1, (self.channels, -1))

    def _by_channel(self, products: Tensor) -> Tensor:
        return products.double().unflatten(2, (self.channels, -1)).unflatten(1, (self.channels, -1))

    def _slice(self, tap: int, first: int, count: int) -> slice:
        step = self.window.stride[0]
        start = tap * self.window.dilation[0] + first * step
        return slice(start, start + (count - 1) * step + 1, step)

    def _read(self, tap: int, first: int, count: int) -> Tensor:
        # [G, C * R, count * M]
        return self._columns[:, :, self._slice(tap, first, count)].flatten(2)


def _with_itself(rows: Tensor) -> Tensor:
    """[G, n, n]: the products of rows [G, n, M] with each other; each `BLOCK` rows with those from its first one on."""
    count = rows.shape[1]
    if count <= BLOCK:
        return rows @ rows.mT
    found = rows.new_empty(len(rows), count, count, dtype=torch.float64)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        found[:, block, start:] = rows[:, block] @ rows[:, start:].mT
        found[:, block, :start] = found[:, :start, block].mT
    return found


def _columns(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """[G, C * R, rows, M]: each channel minus its mean, copied for each of the R taps along all axes but the first.

    `rows` are rows of the padded input; M runs over images and the other output axes. Also returns the mean, float64.
    """
    deviations, mean = _centred(padded(x, window))
    values = patch_values(deviations, window, axes=range(1, len(window.kernel)))  # [C, *taps, N, rows, *others]
    taps = len(window.kernel) - 1
    copies = values.movedim(taps + 2, taps + 1)
    rows = copies.shape[taps + 1]
    return copies.reshape(window.groups, x.shape[1] // window.groups * prod(window.kernel[1:]), rows, -1), mean


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


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel minus its mean, in float32 (float64 for float64); and the mean, float64 (C,)."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims)
    return x - mean.view(-1, *[1] * (x.ndim - 2)), mean.double()
