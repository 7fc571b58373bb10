"""Is what a loader gives a fair sample? Classes one after the other, samplers that pad: no error would show them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DistributedSampler

log = logging.getLogger("resuscitate")

LABEL_KEYS = ("label", "labels", "target", "targets", "cls", "y")
ENOUGH = 32  # labels in order that are no accident


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
