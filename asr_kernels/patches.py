"""Second moments of convolution patches, and their products with an output: the normal equations of least squares.

For inputs x (N, C, *spatial) a patch has K = (C / groups) * prod(kernel) values, in the order of the weight's trailing
axes. On a CPU the products are computed by rows of taps, on a GPU as products of whole matrices of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import backend_for, torch_patches, whole_patches
from .precision import full_precision
from .window import Window

ALL: Mapping[int, Tensor | None] = MappingProxyType({0: None})  # all images are in one fold


@dataclass(eq=False)
class CrossProducts:
    """Sums over patches x and outputs y of deviations from given points, float64. `+` adds the sums of two batches.

    `xy` (G, K, O): products of deviations; `y` (G, O): deviations of y; `yy` (G, O): their squares.
    """

    xy: Tensor
    y: Tensor
    yy: Tensor

    def __add__(self, other: CrossProducts) -> CrossProducts:
        return CrossProducts(self.xy + other.xy, self.y + other.y, self.yy + other.yy)


@dataclass(eq=False)
class PatchMoments:
    """Centred second moments of patches x (K values) and outputs y (O values), float64, for each of G groups.

    `count`: number of patches. `mean` (G, K) and `target` (G, O): means of x and y. `xx` (G, K, K) and `xy` (G, K, O):
    sums of products of deviations. `yy` (G, O): sums of squared deviations. They merge exactly (Chan et al. 1979).
    """

    count: int
    mean: Tensor
    target: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def merge(self, other: PatchMoments) -> PatchMoments:
        """Moments of both sets of patches together; one of the two objects itself where the other is empty."""
        if not self.count or not other.count:
            return self if self.count else other
        return self._with(other, 1)

    def without(self, other: PatchMoments) -> PatchMoments:
        """The inverse of `merge`: moments of these patches without the others, which must be some of them."""
        return self._with(other, -1) if other.count else self

    def _with(self, other: PatchMoments, sign: int) -> PatchMoments:
        """With the other patches (sign 1), or without them (-1)."""
        count = self.count + sign * other.count
        share = sign * other.count / count if count else 0.0
        weight = self.count * share
        dx, dy = other.mean - self.mean, other.target - self.target
        return PatchMoments(
            count,
            self.mean + dx * share,
            self.target + dy * share,
            torch.add(self.xx, other.xx, alpha=sign).baddbmm_(dx[:, :, None], dx[:, None, :], alpha=weight),
            torch.add(self.xy, other.xy, alpha=sign).baddbmm_(dx[:, :, None], dy[:, None, :], alpha=weight),
            torch.add(self.yy, other.yy, alpha=sign).add_(dy.square() * weight).clamp_(min=0),
        )

    @property
    def diagonal(self) -> Tensor:
        """The diagonals of `xx`, (G, K)."""
        return self.xx.diagonal(dim1=1, dim2=2)

    def of_channels(self, groups: Tensor, rows: Tensor) -> PatchMoments:
        """The moments of some groups (S, 1) with some of their outputs alone, rows (S, R)."""
        one = groups[:, 0]
        xx = self.xx if len(one) == len(self.xx) else self.xx[one]
        y, xy, yy = self.target[groups, rows], self.xy.mT[groups, rows].mT, self.yy[groups, rows]
        return PatchMoments(self.count, self.mean[one], y, xx, xy, yy)


class PatchSums:
    """The patch moments of batches of inputs x and target outputs y, by fold of the images.

    window: of the layer. budget: bytes for the copies of x that exist at a time; images are processed in chunks that
    fit, at least one each. By default 64 MiB, and 1/64 of the memory of a GPU.

    Products of deviations from the means of a chunk, or on a GPU of the first batch, are summed in float32 (float64 for
    float64), whatever the caller's autocast and TF32 settings: in IEEE float32, or on a GPU as three products of TF32
    parts. Partial sums and chunks are added in float64.
    """

    def __init__(self, window: Window, *, budget: int | None = None) -> None:
        self.window: Window = window
        self.budget: int | None = budget
        self._nothing: dict[int, PatchMoments] = {}  # the moments of folds that had no patches at first
        self._sums: torch_patches.Sums | whole_patches.Sums | None = None

    def add(self, x: Tensor, y: Tensor, folds: Mapping[int, Tensor | None] = ALL) -> None:
        """Add one batch.

        x: (N, C, *spatial), or (..., C) for a linear layer, floating point; y: (N, O, *output spatial), or (..., O).
        folds: of each fold the images that belong to it, int64; None: all.
        Raises ValueError where the shape of y is not the output shape of a layer with this window for x.
        """
        images = len(x)
        x, y, window = _of_images(x, y, self.window)
        if len(x) != images:  # a linear layer: of each image several positions
            folds = {fold: rows if rows is None else _positions(rows, len(x) // images) for fold, rows in folds.items()}
        places = len(y) * prod(y.shape[2:])
        empty = [fold for fold, rows in folds.items() if not places or (rows is not None and not len(rows))]
        for fold in empty:
            self._nothing.setdefault(fold, _no_moments(x, y, window))
        folds = {fold: rows for fold, rows in folds.items() if fold not in empty}
        if not folds:
            return
        budget = _copies_budget(x.device) if self.budget is None else self.budget
        with full_precision(x.device), torch.cuda.device_of(x):
            self._sums = self._sums or backend_for(x, "patches").Sums(x, y, window)
            self._sums.add(x, y, folds, budget)

    def moments(self) -> dict[int, PatchMoments]:
        """The moments of each fold. The sums end with this: their memory is freed."""
        sums, self._sums = self._sums, None
        found = {fold: PatchMoments(*sums.moments(fold)) for fold in list(sums.folds)} if sums else {}
        return self._nothing | found


def patch_moments(x: Tensor, y: Tensor, window: Window, *, budget: int | None = None) -> PatchMoments:
    """The patch moments of one batch: see `PatchSums`."""
    sums = PatchSums(window, budget=budget)
    sums.add(x, y)
    return sums.moments()[0]


def _positions(rows: Tensor, count: int) -> Tensor:
    """Which rows of (images * count, C) belong to these images."""
    return (rows[:, None] * count + torch.arange(count)).flatten()


def _of_images(x: Tensor, y: Tensor, window: Window) -> tuple[Tensor, Tensor, Window]:
    """x and y (N, C, *spatial), and a window for them, also for a linear layer. Raises ValueError."""
    if not window.kernel:
        x, y = x.reshape(-1, x.shape[-1], 1), y.reshape(-1, y.shape[-1], 1)
        window = Window((1,), (1,), ((0, 0),), (1,))
    if x.ndim != len(window.kernel) + 2 or (len(x), *window.output(x.shape[2:])) != (len(y), *y.shape[2:]):
        raise ValueError(f"inputs {tuple(x.shape)} and outputs {tuple(y.shape)} do not belong together: {window}")
    return x, y, window


def cross_products(x: Tensor, y: Tensor, window: Window, mean: Tensor, target: Tensor) -> CrossProducts:
    """The cross products of one batch, about the points `mean` (G, K) and `target` (G, O), float64, near the means.

    x, y, window, precision, errors: as in `PatchSums`, which gives the means. Where `xx` is known already, this is a
    fraction of the work of `patch_moments`: one gradient of a convolution with respect to its weight.
    """
    with full_precision(x.device):
        return _cross_products(x, y, window, mean, target)


def _cross_products(x: Tensor, y: Tensor, window: Window, mean: Tensor, target: Tensor) -> CrossProducts:
    _of_images(x, y, window)  # its errors
    G, O = target.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wanted = y.to(dtype, copy=True)
    if not window.kernel:
        wanted = wanted.reshape(-1, O).sub_(target.view(-1))
        # products about the float32 rounding of the mean; `rest` corrects them below
        about = mean.to(dtype)
        xy = ((x.reshape(-1, x.shape[-1]).to(dtype) - about).mT @ wanted).double()[None]
        rest = mean - about.double()
    else:
        ones = [1] * len(window.kernel)
        wanted.sub_(target.view(-1, *ones))
        C = mean.shape[1] // prod(window.kernel)
        # products about one value per channel; `rest` moves them to the mean of each tap below
        about = mean.view(G * C, -1).mean(1).to(dtype)
        pads = [pad for pair in reversed(window.padding) for pad in pair]
        padded = F.pad(x.to(dtype), pads, window.mode) - about.view(-1, *ones)
        xy = _weight_gradient(padded, wanted, window).double().reshape(G, O, -1).mT
        rest = mean - about.double().view(G, C, 1).expand(-1, -1, prod(window.kernel)).reshape(G, -1)
    dims = [0, *range(2, wanted.ndim)]
    left = wanted.sum(dims).double().view(G, O)
    squares = torch.linalg.vector_norm(wanted, dim=dims).double().square().view(G, O)
    return CrossProducts(xy - rest[:, :, None] * left[:, None, :], left, squares)


def _weight_gradient(x: Tensor, y: Tensor, window: Window) -> Tensor:
    """Gradient (O, C / groups, *kernel) of a convolution's weight, for padded inputs x and the output gradient y."""
    weight, zeros = x.new_empty(y.shape[1], x.shape[1] // window.groups, *window.kernel), [0] * len(window.kernel)
    mask = [False, True, False]
    options = (window.stride, zeros, window.dilation, False, zeros, window.groups, mask)
    found: Tensor = torch.ops.aten.convolution_backward(y, x, weight, None, *options)[1]
    return found


def _copies_budget(device: torch.device) -> int:
    """Bytes for copies. Free memory does not count: chunks, and so the bits of the result, are those of every run."""
    return torch.cuda.get_device_properties(device).total_memory // 64 if device.type == "cuda" else 64 << 20


def _no_moments(x: Tensor, y: Tensor, window: Window) -> PatchMoments:
    """The moments of no patches, all 0."""
    G, K, O = window.groups, x.shape[1] // window.groups * prod(window.kernel), y.shape[1] // window.groups
    shapes = ((G, K), (G, O), (G, K, K), (G, K, O), (G, O))
    return PatchMoments(0, *(x.new_zeros(shape, dtype=torch.float64) for shape in shapes))
