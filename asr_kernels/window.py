"""The window of a layer: which input values each output reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
