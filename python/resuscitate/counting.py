"""Counting images in lists of batches: how many to read, where to cut, how many batches make so many images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .calibration import first_tensor


def count_images(batch: Any) -> int:
    """How many images a batch holds: the length of its first tensor."""
    tensor = first_tensor(batch)
    return 1 if tensor is None else len(tensor)


def most_images(wanted: Sequence[int | None], max_samples: int | None) -> int | None:
    """How many images to read: as many as any step wants, at most `max_samples`; None for all."""
    limits = [max(known)] if (known := [w for w in wanted if w is not None]) and len(known) == len(wanted) else []
    limits += [] if max_samples is None else [max_samples]
    return min(limits, default=None)


def cut(batches: list[Any], images: int | None) -> list[Any]:
    """Split the batch in which image number `images` lies, so that a run of whole batches ends there."""
    index, left = 0, images or 0
    while index < len(batches) and left >= count_images(batches[index]):
        left -= count_images(batches[index])
        index += 1
    if index == len(batches) or not left or not isinstance(batches[index], Tensor):
        return batches
    return [*batches[:index], batches[index][:left], batches[index][left:], *batches[index + 1 :]]


def batches_for(batches: list[Any], images: int | None) -> int:
    """How many whole batches hold the first `images` images, or at least so many."""
    if images is None:
        return len(batches)
    seen = 0
    for index, batch in enumerate(batches):
        if seen >= images:
            return index
        seen += count_images(batch)
    return len(batches)


def first_images(batch: Any, images: int = 2) -> Any:
    """A small batch to look at a network with; an opaque one goes whole."""
    return batch[:images] if isinstance(batch, Tensor) else batch
