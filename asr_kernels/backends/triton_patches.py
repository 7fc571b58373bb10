"""Products of convolution patches in Triton, without copies of the input for each tap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..window import Window
from . import torch_patches
from .triton_moments import channel_moments
from .triton_products import Read, plan_products


class PatchProducts:
    """As `torch_patches.PatchProducts`, for windows of one or two axes; products are summed in float32."""

    def __init__(self, x: Tensor, y: Tensor, window: Window) -> None:
        pads = window.padding
        if window.mode != "constant":
            x, pads = F.pad(x, [p for pair in reversed(pads) for p in pair], window.mode), ((0, 0),) * len(pads)
        if len(window.kernel) == 1:
            x, y = x[..., None], y[..., None]
        self.x, self.y, self.groups = x, y, window.groups
        # one axis: the other has one tap
        one = (1,) * (2 - len(window.kernel))
        self.kernel, self.dilation = window.kernel + one, window.dilation + one
        self.step, self.pads = window.stride + one, (*pads, (0, 0))[:2]
        # [C, H, W], of which the sums over the patches follow
        self._images = x.sum(0, dtype=torch.float64)
        self._about = (self._images.mean((1, 2)) / len(x)).float()
        self.shift = self._about.double()
        found = channel_moments(y, 1, 0.0, None)
        self._outputs = found.mean.float()
        self.target = self._outputs.double()
        left = found.count * (found.mean - self.target)
        self.left, self.squares = left, found.m2 + left.square() / found.count

    @staticmethod
    def copied_bytes(x: Tensor, window: Window) -> int:
        """Nothing is copied."""
        return 0

    def sums(self) -> Tensor:
        """[G, C, taps of an image column, R]: sums of the deviations that a tap reads."""
        # the padding is 0 in each image
        found = F.pad(self._images, (*self.pads[1], *self.pads[0])) - len(self.x) * self.shift[:, None, None]
        for axis in (0, 1):
            span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            found = found.unfold(1 + axis, span, self.step[axis])[..., :: self.dilation[axis]]
        return found.sum((1, 2)).view(self.groups, -1, *self.kernel)

    def of_rows(self, i: int, j: int) -> Tensor:
        """[G, C, R, C, R]: products of what taps i and j of an image column read."""
        return self._by_channel(self._pair(i, j, 0, self.y.shape[2]))

    def of_ends(self, last: tuple[int, int], first: tuple[int, int]) -> Tensor:
        """As `of_rows`, of two taps and the last row of the output, minus those of two other taps and the first row."""
        return self._by_channel(self._pair(*last, self.y.shape[2] - 1, 1).sub_(self._pair(*first, 0, 1)))

    def with_outputs(self, i: int) -> Tensor:
        """[G, C, R, O]: products of what tap i of an image column reads, with the outputs."""
        found = self._product(self._read(i, 0), Read(self.y, self._outputs, 0), self.y.shape[2])
        return found.unflatten(1, (self.kernel[1], -1)).transpose(1, 2)

    def _pair(self, i: int, j: int, first: int, count: int) -> Tensor:
        # for `count` rows of the output from `first` on
        a = self._read(i, first)
        if i != j:
            return self._product(a, self._read(j, first), count)
        upper = self._product(a, a, count).triu()
        return upper + upper.triu(1).mT

    def _by_channel(self, products: Tensor) -> Tensor:
        R = self.kernel[1]
        return products.unflatten(2, (R, -1)).unflatten(1, (R, -1)).permute(0, 2, 1, 4, 3)

    def _read(self, i: int, first: int) -> Read:
        top = i * self.dilation[0] + first * self.step[0] - self.pads[0][0]
        return Read(self.x, self._about, top, -self.pads[1][0], self.step, self.kernel[1], self.dilation[1])

    def _product(self, a: Read, b: Read, rows: int) -> Tensor:
        launch, partials = plan_products(a, b, rows, self.y.shape[3], self.groups)
        launch.run()
        return partials.sum(0, dtype=torch.float64)


def products_for(x: Tensor, y: Tensor, window: Window) -> type[PatchProducts | torch_patches.PatchProducts]:
    """What computes the products of this window; float64 and three axes are left to PyTorch."""
    supported = len(window.kernel) <= 2 and torch.float64 not in (x.dtype, y.dtype)
    return PatchProducts if supported else torch_patches.PatchProducts
