"""Moments of a layer's outputs, and of a BatchNorm's inputs: mean and variance of each channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

import asr_kernels as ak

from ..network.runner import check_finite, moments_at, paired_moments_at
from .base import Place, Statistic, merge_calls

Calls = list[ak.ChannelMoments]


class OutputMoments(Statistic):
    """Moments in the pruned and in the dense network, one set for each call of the layer in a forward pass.

    `calls` and `dense_calls` hold them over all batches; `pairs`, see `OutputCovariances`, is empty. `dead` is boolean
    (C,): channels whose weights are all zero. Their variance is rounding, and counts as zero in `pruned`.
    """

    measured: ClassVar[tuple[str, ...]] = ("calls", "dense_calls", "pairs")

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.by_batch: dict[int, Calls] = {}
        self.dense_by_batch: dict[int, Calls] = {}
        self.calls: Calls = []
        self.dense_calls: Calls = []
        self.pairs: list[ak.PairedMoments] = []
        self.dead: Tensor | None = None

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        for x, found in ((pruned, self.by_batch), (dense, self.dense_by_batch)):
            if x is not None:
                found.setdefault(batch, []).append(moments_at(self.place.name, self.place.module, x))

    def finish(self, batches: int) -> None:
        both = self.by_batch, self.dense_by_batch
        moments = [(batch, each) for found in both for batch in sorted(found) for each in found[batch]]
        check_finite(self.place.name, ((batch, x) for batch, each in moments for x in (each.mean, each.m2)))
        self.calls, self.dense_calls = (pooled_by_call(found, batches) for found in both)

    @property
    def pruned(self) -> ak.ChannelMoments:
        """Over all calls, in the pruned network."""
        found = ak.ChannelMoments.pool(self.calls)
        if self.dead is None:
            return found
        return ak.ChannelMoments(found.count, found.mean, found.m2.masked_fill(self.dead.to(found.m2.device), 0.0))

    @property
    def dense(self) -> ak.ChannelMoments:
        """Over all calls, in the dense network, or of the reference that replaces it."""
        return ak.ChannelMoments.pool(self.dense_calls)

    @property
    def explained(self) -> float | None:
        """The part of the dense variance that `pairs` explain, see `explained`; None without them."""
        return explained(self.pairs)

    @property
    def empty(self) -> bool:
        return any(not sum(each.count for each in calls) for calls in (self.calls, self.dense_calls or self.calls))


class OutputCovariances(OutputMoments):
    """`OutputMoments` with the covariance of both networks' outputs, image by image: `pairs`, one for each call.

    The pruned moments are measured by themselves: a resumed run measures a BatchNorm's inputs without the dense
    network, and must find the same bits.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.pairs_by_batch: dict[int, list[ak.PairedMoments]] = {}

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        if pruned is not None and dense is not None:
            pair = paired_moments_at(self.place.name, self.place.module, dense, pruned)
            self.pairs_by_batch.setdefault(batch, []).append(pair)
            self.dense_by_batch.setdefault(batch, []).append(pair.dense)
        super().update(batch, pruned, None)

    def finish(self, batches: int) -> None:
        super().finish(batches)
        kept = {batch: self.pairs_by_batch[batch] for batch in sorted(self.pairs_by_batch) if batch < batches}
        self.pairs: list[ak.PairedMoments] = reduce(merge_calls, kept.values()) if kept else []
        self.dense_calls: Calls = [pair.dense for pair in self.pairs]


def explained_share(pairs: list[ak.PairedMoments]) -> Tensor:
    """The part of the dense variance that a gain and shift per channel restore, sum(corr^2 var) / sum(var).

    On the device; NaN where the dense outputs are constant.
    """
    variances = [pair.dense.m2 for pair in pairs]
    shares = [pair.corr.square() * m2 for pair, m2 in zip(pairs, variances, strict=True)]
    return torch.stack(shares).sum() / torch.stack(variances).sum()


def explained(pairs: list[ak.PairedMoments]) -> float | None:
    """`explained_share` as a number; None without pairs, and where the dense outputs are constant."""
    share = float(explained_share(pairs)) if pairs else math.nan
    return None if math.isnan(share) else share


def pooled_by_call(found: Mapping[int, Calls], batches: int) -> Calls:
    """Over the first batches, in their order, one set of moments for each call."""
    kept = [found[batch] for batch in sorted(found) if batch < batches]
    most = max(map(len, kept), default=0)
    return [ak.ChannelMoments.pool([calls[call] for calls in kept if len(calls) > call]) for call in range(most)]
