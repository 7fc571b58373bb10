"""Are these images a fair sample? Sorted classes, samplers that pad, another normalisation: no error shows them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DistributedSampler

log = logging.getLogger("resuscitate")

LABEL_KEYS = ("label", "labels", "target", "targets", "cls", "y")
ENOUGH = 32  # labels in order, or values of a channel, that are no accident
told: WeakSet[nn.Module] = WeakSet()  # whose images have been warned of


class ClassOrder:
    """Watches labels go by, where batches have them, for classes that come one after the other."""

    def __init__(self) -> None:
        self.counts = Counter[int]()
        self.last, self.ordered = 0, True

    def see(self, batch: Any, images: int) -> None:
        """Note the labels of a batch."""
        labels = _labels_of(batch, images)
        if labels is not None:
            steps = np.diff(labels, prepend=self.last if self.counts else labels[0])
            self.ordered &= bool((steps >= 0).all())
            self.last = int(labels[-1])
            self.counts.update(labels.tolist())

    def warn(self) -> None:
        """Say so where they came in order. For when a limit has left the rest unread."""
        if self.ordered and self.counts.total() >= ENOUGH:
            seen = ", ".join(f"{label}: {count}" for label, count in [*self.counts.items()][:5])
            log.warning(
                "the images come sorted by class, and only the first %d are used (class: images: %s%s); shuffle them, "
                "or the statistics are those of these classes alone",
                self.counts.total(),
                seen,
                ", ..." if len(self.counts) > 5 else "",
            )


def warn_of_padding(loader: Any) -> None:
    """Say so where a DataLoader's DistributedSampler repeats images, so that all ranks have as many."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        repeated = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
        if repeated > 0:
            log.warning(
                "the loader's DistributedSampler repeats %d images to give every rank as many, and they count twice; "
                "ranks may have different numbers of images here: deal them out one by one, as images.load_images "
                "does with shard=(rank, ranks)",
                repeated,
            )


def warn_of_normalisation(dense: nn.Module, batch: Any, run: Callable[[Any], Any]) -> None:
    """Say so where the first BatchNorm of the dense network sees far other statistics than in training.

    run: a forward pass of it on the batch; only its beginning is run. Far: the median channel's mean by over one
    standard deviation, or its variance by over a factor of four. A wrong `mean` or `std` for the images does that.
    """
    if dense in told:
        return
    seen: list[tuple[_BatchNorm, Tensor]] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append((module, args[0]))  # type: ignore[arg-type]
            raise _SeenError

    batchnorms = [m for m in dense.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    handles = [module.register_forward_pre_hook(take) for module in batchnorms]
    try:
        with suppress(_SeenError):
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or seen[0][1].shape[0] * seen[0][1][0, 0].numel() < ENOUGH:
        return
    batchnorm, x = seen[0]
    mean, var = (t.double() for t in (batchnorm.running_mean, batchnorm.running_var))  # type: ignore[union-attr]
    now_var, now_mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    off = float(((now_mean - mean).abs() / (var + batchnorm.eps).sqrt()).median())
    ratio = float((now_var / (var + batchnorm.eps)).median())
    # of NaN and infinity the walk says more
    if math.isfinite(off + ratio) and (off > 1 or not 1 / 4 < ratio < 4):
        told.add(dense)
        log.warning(
            "the images may not be normalised as the network was trained: before its first BatchNorm the median "
            "channel has %.3g times the variance and a mean %.3g standard deviations off",
            ratio,
            off,
        )


class _SeenError(BaseException):
    """Ends a forward pass; not an Exception, lest a model catches it."""


def _labels_of(batch: Any, images: int) -> np.ndarray | None:
    """One whole number for each image, if the batch has them."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(found, Tensor | np.ndarray) or found.ndim != 1 or len(found) != images:
        return None
    labels = found.cpu().numpy() if isinstance(found, Tensor) else found
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else None
