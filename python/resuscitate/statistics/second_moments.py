"""The second moments xx of a layer's inputs: a matrix for each group, or the deviations that they are made of.

A linear layer with tens of thousands of inputs, behind a flattened image, has far fewer samples than inputs. Then the
samples take less memory than the matrix, and products with them less time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch.nn.functional import normalize

from asr_kernels import PatchMoments, RowMoments

Moments = PatchMoments | RowMoments
NOISE = 3e-5  # a part of what is subtracted from a sum of squares; 10,000 equal windows left up to 5e-6 of it
MOST_RANK, VALUES_PER_RANK = 32, 32  # of the low-rank part: the most, and one for so many values


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    return reduce(lambda one, other: one.merge(other), parts)  # type: ignore[arg-type]


def without_noise(moments: Moments, kernel: int) -> Moments:
    """The moments, with xx set to 0, in place, in groups whose inputs vary by no more than rounding.

    kernel: how many inputs a channel has. The sums are of float32 deviations from the mean of a channel, from which
    those of each input's own mean are subtracted. So equal windows leave a rest, but not with one input a channel.
    """
    if isinstance(moments, RowMoments) or kernel == 1:
        return moments
    by_channel = moments.mean.unflatten(1, (-1, kernel))
    subtracted = moments.count * (by_channel - by_channel.mean(2, keepdim=True)).square().amax((1, 2))
    moments.xx.mul_((moments.diagonal.amax(1) > NOISE * subtracted)[:, None, None])
    return moments


def as_groups(parts: Sequence[Moments]) -> Moments:
    """Moments with the groups of all parts, which are `PatchMoments` if there are several."""
    if len(parts) == 1:
        return parts[0]
    each = [(p.mean, p.target, p.xx, p.xy, p.yy) for p in parts]
    return PatchMoments(sum(p.count for p in parts), *(torch.cat(tensors) for tensors in zip(*each, strict=True)))


class SecondMoments(ABC):
    """The second moments xx of G groups of K values."""

    groups: int
    values: int
    device: torch.device

    @abstractmethod
    def times(self, w: Tensor, groups: slice = slice(None)) -> Tensor:
        """w xx for w (G, R, K), in the dtype of w, float32 or float64."""

    def single(self, groups: slice = slice(None)) -> Callable[[Tensor], Tensor]:
        """`times` for float32 alone, to be called many times: each small operation there takes time on a GPU's host."""
        return lambda w: self.times(w, groups)

    @cached_property
    def low_rank(self) -> Tensor:
        """B (G, r, K), float32: B' B has most of the largest eigenvalues of xx, and exceeds xx in no direction.

        The Nyström approximation from products with random vectors (Frangella, Tropp and Udell 2023). These are
        multiplied by xx twice, which brings out the largest eigenvalues.
        """
        rank = max(1, min(MOST_RANK, self.values // VALUES_PER_RANK))
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(self.groups, rank, self.values, generator=generator, dtype=torch.float64)
        vectors = normalize(self.times(vectors.to(self.device, non_blocking=True)), dim=2)
        products = self.times(vectors)
        core = products @ vectors.mT
        diagonal = core.diagonal(dim1=1, dim2=2)
        diagonal.add_(1e-10 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)  # for the factor
        return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(core).L, products, upper=False).float()


class Matrices(SecondMoments):
    """Second moments as matrices xx (G, K, K), float64."""

    def __init__(self, xx: Tensor) -> None:
        self.xx, (self.groups, self.values, _), self.device = xx, xx.shape, xx.device

    @cached_property
    def _single(self) -> Tensor:
        return self.xx.float()

    def times(self, w: Tensor, groups: slice = slice(None)) -> Tensor:
        return w @ (self.xx if w.dtype == torch.float64 else self._single)[groups]

    def single(self, groups: slice = slice(None)) -> Callable[[Tensor], Tensor]:
        matrices = self._single[groups]
        return lambda w: torch.bmm(w, matrices)

    def within(self, group: Tensor, places: Tensor) -> Tensor:
        """The matrices (B, n, n) of these places (B, n) of these groups (B,)."""
        # one index for each element, which PyTorch gathers faster than by three
        first = (group[:, None] * self.values + places) * self.values
        index = first[:, :, None] + places[:, None, :]
        return self.xx.reshape(-1).index_select(0, index.flatten()).view(index.shape)


class Rows(SecondMoments):
    """Second moments of one group as `RowMoments`."""

    def __init__(self, moments: RowMoments) -> None:
        self.moments, self.groups, self.values, self.device = moments, 1, moments.x.shape[1], moments.x.device

    def times(self, w: Tensor, groups: slice = slice(None)) -> Tensor:
        x, scale = self.moments.x.to(w.dtype), self.moments.scale.to(w.dtype)
        return ((w @ x.mT) * scale) @ x
