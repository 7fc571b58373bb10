"""The second moments xx of a layer's inputs: a matrix for each group, or the deviations that they are made of.

A linear layer with tens of thousands of inputs, behind a flattened image, has far fewer samples than inputs. Then the
samples take less memory than the matrix, and products with them less time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, reduce

import torch
from torch import Tensor

from asr_kernels import PatchMoments, RowMoments

Moments = PatchMoments | RowMoments


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    return reduce(lambda one, other: one.merge(other), parts)  # type: ignore[arg-type]


class Matrices:
    """Second moments as matrices xx (G, K, K), float64."""

    def __init__(self, xx: Tensor) -> None:
        self.xx, self.groups = xx, len(xx)

    @cached_property
    def _single(self) -> Tensor:
        return self.xx.float()

    def times(self, w: Tensor, groups: slice = slice(None)) -> Tensor:
        """w xx for w (G, R, K), in the dtype of w, float32 or float64."""
        return w @ (self.xx if w.dtype == torch.float64 else self._single)[groups]

    def within(self, group: Tensor, places: Tensor) -> Tensor:
        """The matrices (B, n, n) of these places (B, n) of these groups (B,)."""
        return self.xx[group[:, None, None], places[:, :, None], places[:, None, :]]


class Rows:
    """Second moments of one group as `RowMoments`."""

    def __init__(self, moments: RowMoments) -> None:
        self.moments, self.groups = moments, 1

    def times(self, w: Tensor, groups: slice = slice(None)) -> Tensor:
        """w xx for w (1, R, K), in the dtype of w, float32 or float64."""
        x, scale = self.moments.x.to(w.dtype), self.moments.scale.to(w.dtype)
        return ((w @ x.mT) * scale) @ x
