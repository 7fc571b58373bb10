"""Products of convolution patches as products of whole matrices, for a GPU: few launches, on the tensor cores.

The matrix of patches takes prod(kernel) times the memory of the input, which a GPU has. float32 values are split into
two parts of TF32, high and low; of the four products of parts, that of the two low ones is below the rounding of
float32 and left out. A tensor core rounds its sums towards 0, an error that grows with the number of summands, so sums
run over `PIECE` patches and are added in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..precision import tensor_cores
from ..window import Window
from .torch_patches import padded, patch_values

PIECE = 1024  # patches that are summed in float32
LOW_BITS = 0x1FFF  # the bits of the mantissa of float32 that TF32 lacks
Segment = tuple[int, int]  # a fold, and a number of its images


@dataclass
class Totals:
    """Sums over the patches of a fold, float64: products (G, K + 1, R) of (patch, 1) with (patch, 1, outputs).

    squares (G * O,): of the outputs.
    """

    count: int
    products: Tensor
    squares: Tensor


class Sums:
    """Sums over patches and outputs, by fold, of deviations about the means of the first batch, and their products.

    float64 is multiplied in float64. Products of one of several groups are too small for the tensor cores: in float32.
    """

    def __init__(self, x: Tensor, y: Tensor, window: Window) -> None:
        self.window, G = window, window.groups
        self.dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        self.in_parts = G == 1 and self.dtype == torch.float32
        self.K, self.O = x.shape[1] // G * prod(window.kernel), y.shape[1] // G
        self.about, self.target = (
            each.mean([0, *range(2, each.ndim)], dtype=self.dtype) for each in (padded(x, window), y)
        )
        self.R = self.K + 1 + self.O
        self.folds: dict[int, Totals] = {}

    def add(self, x: Tensor, y: Tensor, folds: Mapping[int, Tensor | None], budget: int) -> None:
        """Add a batch. folds: of each, which images belong to it, int64; None: all. budget: bytes for copies."""
        sizes = {fold: len(x) if rows is None else len(rows) for fold, rows in folds.items()}
        if chosen := [rows for rows in folds.values() if rows is not None]:
            order = torch.cat(chosen).to(x.device, non_blocking=True)
            x, y = x.index_select(0, order), y.index_select(0, order)
        copied = 2 * self.about.itemsize * (self.K + self.O) * self.window.groups * prod(y.shape[2:])  # of an image
        start = 0
        for segments in _chunks(sizes, max(budget // max(copied, 1), 1)):
            stop = start + sum(images for _, images in segments)
            self._add(x[start:stop], y[start:stop], segments)
            start = stop

    def _add(self, x: Tensor, y: Tensor, segments: list[Segment]) -> None:
        images, places = [images for _, images in segments], prod(y.shape[2:])
        x, y = (
            each.to(self.dtype) - point.view(-1, *[1] * (x.ndim - 2))
            for each, point in ((padded(x, self.window), self.about), (y, self.target))
        )
        matrix, pieces = self._matrix(x, y, images)
        squares = y.square().flatten(2).sum(2)
        for (fold, n), *new in zip(
            segments, self._multiplied(matrix).split(pieces), squares.split(images), strict=True
        ):
            products, squared = (each.sum(0, dtype=torch.float64) for each in new)
            if totals := self.folds.get(fold):
                totals.count += n * places
                totals.products += products
                totals.squares += squared
            else:
                self.folds[fold] = Totals(n * places, products, squared)

    def _matrix(self, x: Tensor, y: Tensor, images: list[int]) -> tuple[Tensor, list[int]]:
        """[parts, G, R, P, length] from deviations, zero where a piece is not full; the pieces of each fold, P in all.

        Rows: the values of a patch, a one, the outputs, and zeros up to a multiple of 4. Columns: patches.
        """
        G, K, places = self.window.groups, self.K, prod(y.shape[2:])
        pieces = [-(-n * places // PIECE) for n in images]
        length = max(-(-n * places // count) for n, count in zip(images, pieces, strict=True))
        length += -length % 4
        read, outputs = (tf32_parts(each) if self.in_parts else each[None] for each in (x, y))
        # [C, *kernel, parts * N, *output] -> [parts, G, C / G, *kernel, N, *output]; [parts, G, O, N, *output]
        at = 1 + len(self.window.kernel)
        patches = patch_values(read.flatten(0, 1), self.window).unflatten(at, read.shape[:2]).movedim(at, 0)
        patches, outputs = patches.unflatten(1, (G, -1)), outputs.transpose(1, 2).unflatten(1, (G, -1))
        matrix = x.new_zeros(len(read), G, self.R + -self.R % 4, sum(pieces), length)
        columns, first = matrix.flatten(3), 0
        for n, count, *values in zip(
            images, pieces, patches.split(images, at + 2), outputs.split(images, 3), strict=True
        ):
            filled = columns[..., first : first + n * places]
            for rows, value in zip((slice(K), slice(K + 1, self.R)), values, strict=True):
                filled[:, :, rows].view(value.shape).copy_(value)
            filled[0, :, K] = 1
            first += count * length
        return matrix, pieces

    def _multiplied(self, matrix: Tensor) -> Tensor:
        """[P, G, K + 1, R]: the products of the first K + 1 rows with all, by piece."""
        parts, first = matrix.movedim(3, 1), slice(self.K + 1)
        high, *rest = parts.flatten(1, 2)
        if rest:
            (low,) = rest
            with tensor_cores(high.device):
                found = high[:, first] @ low.mT
                for one, other in ((low, high), (high, high)):
                    found = found.baddbmm_(one[:, first], other.mT)
        else:
            found = high[:, first] @ high.mT
        return found.unflatten(0, parts.shape[1:3])

    def moments(self, fold: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The parts of `PatchMoments` of a fold, whose sums are freed."""
        totals, K, G = self.folds.pop(fold), self.K, self.window.groups
        count, products, squares = totals.count, totals.products, totals.squares
        x, y = products[:, K, :K], products[:, K, K + 1 : self.R]  # sums
        xx, xy = products[:, :K, :K], products[:, :K, K + 1 : self.R]
        about = self.about.view(G, -1, 1).expand(-1, -1, prod(self.window.kernel)).reshape(G, -1)
        return (
            count,
            about + x / count,
            self.target.view(G, -1) + y / count,
            ((xx + xx.mT) / 2).baddbmm_(x[:, :, None], x[:, None, :], alpha=-1 / count),
            torch.baddbmm(xy, x[:, :, None], y[:, None, :], alpha=-1 / count),
            (squares.view(G, -1) - y.square() / count).clamp(min=0),
        )


def tf32_parts(x: Tensor) -> Tensor:
    """[2, *x.shape]: x rounded to TF32, and the rest."""
    high = ((x.view(torch.int32) + (LOW_BITS + 1) // 2) & ~LOW_BITS).view(torch.float32)
    return torch.stack([high, x - high])


def _chunks(sizes: Mapping[int, int], most: int) -> Iterator[list[Segment]]:
    """The images of all folds, one fold after the other, in chunks of at most `most`."""
    chunk: list[Segment] = []
    room = most
    for fold, left in sizes.items():
        while left:
            images = min(left, room)
            chunk.append((fold, images))
            left, room = left - images, room - images
            if not room:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk
