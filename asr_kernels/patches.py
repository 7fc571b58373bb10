"""Second moments of convolution patches, and their products with an output: the normal equations of least squares.

For inputs x (N, C, *spatial) a patch has K = (C / groups) * prod(kernel) values, in the order of the weight's trailing
axes. Two kernel taps that lie one stride apart along the first spatial axis read the same rows, except one row at each
end. So most of the K x K products follow from earlier ones by adding one row and subtracting one: a 3x3 kernel at
stride 1 computes 3 of 9 products of rows. PyTorch needs a copy of the input for each tap along the other axes, Triton
none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import repeat
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import backend_for
from .precision import full_precision
from .window import Window


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
        count = self.count + other.count
        share, weight = other.count / count, self.count * (other.count / count)
        dx, dy = other.mean - self.mean, other.target - self.target
        return PatchMoments(
            count,
            self.mean + dx * share,
            self.target + dy * share,
            torch.baddbmm(self.xx + other.xx, dx[:, :, None], dx[:, None, :], alpha=weight),
            torch.baddbmm(self.xy + other.xy, dx[:, :, None], dy[:, None, :], alpha=weight),
            self.yy + other.yy + dy.square() * weight,
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

    def without(self, other: PatchMoments) -> PatchMoments:
        """The inverse of `merge`: moments of these patches without the others, which must be some of them."""
        if not other.count:
            return self
        count = self.count - other.count
        share = other.count / count if count else 0.0
        dx, dy = self.mean - other.mean, self.target - other.target
        weight = share * self.count
        return PatchMoments(
            count,
            self.mean + dx * share,
            self.target + dy * share,
            torch.baddbmm(self.xx - other.xx, dx[:, :, None], dx[:, None, :], alpha=-weight),
            torch.baddbmm(self.xy - other.xy, dx[:, :, None], dy[:, None, :], alpha=-weight),
            (self.yy - other.yy - dy.square() * weight).clamp(min=0),
        )


def patch_moments(x: Tensor, y: Tensor, window: Window, *, budget: int | None = None) -> PatchMoments:
    """The patch moments of one batch of inputs x and target outputs y.

    x: (N, C, *spatial), or (..., C) for a linear layer, floating point; y: (N, O, *output spatial), or (..., O).
    budget: bytes for the copies of x that exist at a time in PyTorch; images are processed in chunks that fit, at least
    one each. By default 64 MiB, and 1/64 of the memory of a GPU.

    Products of deviations from the chunk's mean are summed in float32 (float64 for float64), whatever the caller's
    autocast and TF32 settings: in IEEE float32 in PyTorch, as three products of TF32 parts in Triton. Partial sums and
    chunks are added in float64. The Triton backend leaves float64 and windows of three axes to PyTorch.
    Raises ValueError where the shape of y is not the output shape of a layer with this window for x.
    """
    if not window.kernel:
        x, y = x.reshape(-1, x.shape[-1], 1), y.reshape(-1, y.shape[-1], 1)
        window = Window((1,), (1,), ((0, 0),), (1,))
    if x.ndim != len(window.kernel) + 2 or (len(x), *window.output(x.shape[2:])) != (len(y), *y.shape[2:]):
        raise ValueError(f"inputs {tuple(x.shape)} and outputs {tuple(y.shape)} do not belong together: {window}")
    if not len(y) * prod(y.shape[2:]):
        return _no_moments(x, y, window)
    kind = backend_for(x, "patches").products_for(x, y, window)
    budget = _copies_budget(x.device) if budget is None else budget
    images = max(1, budget // max(kind.copied_bytes(x, window), 1))
    with full_precision(x.device), torch.cuda.device_of(x):
        return reduce(PatchMoments.merge, map(_moments, x.split(images), y.split(images), repeat(window), repeat(kind)))


def cross_products(x: Tensor, y: Tensor, window: Window, mean: Tensor, target: Tensor) -> CrossProducts:
    """The cross products of one batch, about the points `mean` (G, K) and `target` (G, O), float64, near the means.

    x, y, window, precision: as in `patch_moments`, which also returns the means. Where `xx` is known already, this is a
    fraction of the work of `patch_moments`: one gradient of a convolution with respect to its weight.
    """
    with full_precision(x.device):
        return _cross_products(x, y, window, mean, target)


def _cross_products(x: Tensor, y: Tensor, window: Window, mean: Tensor, target: Tensor) -> CrossProducts:
    G, O = target.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wanted = y.to(dtype, copy=True)
    if not window.kernel:
        wanted = wanted.view(-1, O).sub_(target.view(-1))
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


def _moments(x: Tensor, y: Tensor, window: Window, kind: Any) -> PatchMoments:
    """Patch moments of one chunk, from the `PatchProducts` of a backend."""
    G, C, taps = window.groups, x.shape[1] // window.groups, window.kernel[0]
    step, hop, rows = window.stride[0], window.dilation[0], y.shape[2]
    R, K, count = prod(window.kernel[1:]), C * prod(window.kernel), len(y) * prod(y.shape[2:])
    products = kind(x, y, window)
    xx = x.new_empty(G, C, taps, R, C, taps, R, dtype=torch.float64)
    blocks: dict[tuple[int, int], Tensor] = {}
    for i in range(taps):
        for j in range(i, taps):
            before = (i * hop - step) / hop
            if before >= 0 and before == int(before) and rows > 2:
                # the pair of taps one stride earlier reads the same rows, except its first row and this pair's last
                a, b = int(before), int(before) + j - i
                # in place: new memory costs more than the sums
                blocks[i, j] = products.of_ends((i, j), (a, b)).add_(blocks[a, b])
            else:
                blocks[i, j] = products.of_rows(i, j)
            xx[:, :, i, :, :, j] = blocks[i, j]
            if i != j:
                xx[:, :, j, :, :, i] = blocks[i, j].permute(0, 3, 4, 1, 2)
    xy = torch.stack([products.with_outputs(i) for i in range(taps)], dim=2).view(G, K, -1)
    sums, left = products.sums().reshape(G, K), products.left.view(G, -1)
    shift = products.shift.view(G, C, 1).expand(-1, -1, taps * R).reshape(G, K)
    return PatchMoments(
        count,
        sums / count + shift,
        products.target.view(G, -1) + left / count,
        xx.view(G, K, K).baddbmm_(sums[:, :, None], sums[:, None, :], alpha=-1 / count),
        xy.baddbmm_(sums[:, :, None], left[:, None, :], alpha=-1 / count),
        (products.squares.view(G, -1) - left.square() / count).clamp(min=0),
    )
