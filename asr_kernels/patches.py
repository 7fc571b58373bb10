"""Second moments of convolution patches, and their products with an output: the normal equations of least squares.

For inputs x (N, C, *spatial) a patch has K = (C / groups) * prod(kernel) values, in the order of the weight's trailing
axes. Two kernel taps that lie one stride apart along the first spatial axis read the same rows, except one row at each
end. So most of the K x K products follow from earlier ones by adding one row and subtracting one: a 3x3 kernel at
stride 1 computes 3 of 9 products of rows. For the taps along the other axes the input is copied once per tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import repeat
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import full_precision


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation of a layer along each spatial axis, and groups. () for a linear layer.

    `padding` is (before, after) for each axis; `mode` is that of `torch.nn.functional.pad`.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    mode: str = "constant"

    def output(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for inputs of these spatial sizes."""
        each = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + sum(pad) - (k - 1) * d - 1) // s + 1 for n, k, s, pad, d in each)


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


def patch_moments(x: Tensor, y: Tensor, window: Window, *, budget: int = 64 << 20) -> PatchMoments:
    """The patch moments of one batch of inputs x and target outputs y.

    x: (N, C, *spatial), or (..., C) for a linear layer, floating point; y: (N, O, *output spatial), or (..., O).
    budget: bytes for the copies of x that exist at a time; images are processed in chunks that fit, at least one each.

    Products of deviations from the chunk's mean are summed in IEEE float32 (float64 for float64), whatever the caller's
    autocast and TF32 settings. Chunks merge in float64.
    Raises ValueError where the shape of y is not the output shape of a layer with this window for x.
    """
    if not window.kernel:
        x, y = x.reshape(-1, x.shape[-1], 1), y.reshape(-1, y.shape[-1], 1)
        window = Window((1,), (1,), ((0, 0),), (1,))
    if x.ndim != len(window.kernel) + 2 or (len(x), *window.output(x.shape[2:])) != (len(y), *y.shape[2:]):
        raise ValueError(f"inputs {tuple(x.shape)} and outputs {tuple(y.shape)} do not belong together: {window}")
    copies = prod(window.kernel[1:]) * max(x.element_size(), 4)
    padded = prod(n + sum(pad) for n, pad in zip(x.shape[2:], window.padding, strict=True))
    images = max(1, budget // max(copies * x.shape[1] * padded, 1))
    with full_precision(x.device):
        return reduce(PatchMoments.merge, map(_moments, x.split(images), y.split(images), repeat(window)))


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


def _moments(x: Tensor, y: Tensor, window: Window) -> PatchMoments:
    """Patch moments of one chunk."""
    G, C, taps = window.groups, x.shape[1] // window.groups, window.kernel[0]
    step, hop = window.stride[0], window.dilation[0]
    columns, shift = _columns(x, window)
    wanted, target = _centred(y)
    # [G, O, rows, M], rows of the output
    wanted = wanted.transpose(0, 1).transpose(1, 2).reshape(G, -1, y.shape[2], columns.shape[-1])
    rows, R = wanted.shape[2], columns.shape[1] // C

    def read(tap: int, first: int, count: int) -> Tensor:
        # the input values that a tap reads for `count` output rows, from row `first` on: [G, C * R, count * M]
        start = tap * hop + first * step
        return columns[:, :, start : start + (count - 1) * step + 1 : step].flatten(2)

    xx = x.new_empty(G, C, taps, R, C, taps, R, dtype=torch.float64)
    xy = x.new_empty(G, C, taps, R, wanted.shape[1], dtype=torch.float64)
    sums = x.new_empty(G, C, taps, R, dtype=torch.float64)
    by_row = columns.sum(-1).double()
    blocks: dict[tuple[int, int], Tensor] = {}
    for i in range(taps):
        mine = read(i, 0, rows)
        sums[:, :, i] = by_row[:, :, i * hop : i * hop + (rows - 1) * step + 1 : step].sum(-1).view(G, C, R)
        xy[:, :, i] = (mine @ wanted.flatten(2).mT).view(G, C, R, -1)
        for j in range(i, taps):
            before = (i * hop - step) / hop
            if before >= 0 and before == int(before) and rows > 2:
                # the pair of taps one stride earlier reads the same rows, except its first row and this pair's last
                a, b = int(before), int(before) + j - i
                last = read(i, rows - 1, 1) @ read(j, rows - 1, 1).mT
                blocks[i, j] = blocks[a, b] + last - read(a, 0, 1) @ read(b, 0, 1).mT
            else:
                blocks[i, j] = mine @ (mine if i == j else read(j, 0, rows)).mT
            block = blocks[i, j].view(G, C, R, C, R)
            xx[:, :, i, :, :, j] = block
            xx[:, :, j, :, :, i] = block.permute(0, 3, 4, 1, 2)
    count = rows * columns.shape[-1]
    K = C * taps * R
    sums, xy = sums.view(G, K), xy.view(G, K, -1)
    left = wanted.sum((2, 3)).double()  # 0 but for rounding
    mean = sums / count + shift.view(G, C, 1).expand(-1, -1, taps * R).reshape(G, K)
    return PatchMoments(
        count,
        mean,
        target.view(G, -1) + left / count,
        torch.baddbmm(xx.view(G, K, K), sums[:, :, None], sums[:, None, :], alpha=-1 / count),
        torch.baddbmm(xy, sums[:, :, None], left[:, None, :], alpha=-1 / count),
        torch.linalg.vector_norm(wanted, dim=(2, 3)).double().square() - left.square() / count,
    )


def _columns(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """[G, C * R, rows, M]: each channel minus its mean, copied for each of the R taps along all axes but the first.

    `rows` are rows of the padded input; M runs over images and the other output axes. Also returns the mean, float64.
    """
    pads = [pad for pair in reversed(window.padding) for pad in pair]
    padded, mean = _centred(F.pad(x, pads, window.mode) if any(pads) else x)
    for axis in range(1, len(window.kernel)):
        span = (window.kernel[axis] - 1) * window.dilation[axis] + 1
        padded = padded.unfold(2 + axis, span, window.stride[axis])[..., :: window.dilation[axis]]
    dims, rest = len(window.kernel), range(3, 2 + len(window.kernel))
    # [N, C, rows, *others, *taps] -> [C, *taps, rows, N, *others]
    copies = padded.permute(1, *range(2 + dims, padded.ndim), 2, 0, *rest)
    return copies.reshape(
        window.groups, x.shape[1] // window.groups * prod(window.kernel[1:]), copies.shape[dims], -1
    ), mean


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel minus its mean, in float32 (float64 for float64); and the mean, float64 (C,)."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims)
    return x - mean.view(-1, *[1] * (x.ndim - 2)), mean.double()
