"""How many images of a loader there is room for: the images are kept, and what a walk has waiting of each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import count_images
from ..network.runner import Network
from ..runtime.activations import Store, parse_memory
from .walk import most_waiting

log = logging.getLogger("resuscitate")
MANY = 10_000


class Room:
    """Bytes that batches may take in all; reading stops at the first batch that takes more than is left.

    limits: pairs of a number of bytes, and of a function from a batch to how many it takes of them.
    lacking, remedy: for the log, what has no room for more, and what to do about it.
    """

    def __init__(self, limits: Sequence[tuple[int, Callable[[Any], int]]], lacking: str, remedy: str) -> None:
        self.left, self.costs = [size for size, _ in limits], [cost for _, cost in limits]
        self.lacking, self.remedy = lacking, remedy

    def take(self, batch: Any) -> bool:
        """Take what a batch needs, if so much is left."""
        left = [size - cost(batch) for size, cost in zip(self.left, self.costs, strict=True)]
        if min(left) < 0:
            return False
        self.left = left
        return True

    def hint(self, total: int | None) -> None:
        """Say how to be faster, where a user who gave no limit has many images."""
        if total is not None and total > MANY:
            log.info("all %s images of the loader are read, if there is room; max_samples= takes fewer", f"{total:,}")

    def warn(self, used: int, total: int | None) -> None:
        """Say that reading ends here, after `used` images of `total`, None where nobody knows how many there are."""
        log.warning(
            "only the first %s images are used: there is no room for more in %s; %smax_samples= says how many to take",
            f"{used:,}" if total is None else f"{used:,} of {total:,}",
            self.lacking,
            self.remedy,
        )


def in_stores(images: Store, activations: Store, nets: Sequence[Network]) -> Room:
    """Room for the images in one store, and in another, or the same, for what a walk of `nets` has waiting of them."""
    each: list[float] = []

    def waiting(batch: Any) -> int:
        if not each:
            few = nets[0].example(batch)
            each.append(sum(most_waiting(net, few) for net in nets) / count_images(few))
        return int(each[0] * count_images(batch))

    limits: list[tuple[int, Callable[[Any], int]]] = [(images.room(), bytes_of), (activations.room(), waiting)]
    if images is activations:
        limits = [(images.room(), lambda batch: bytes_of(batch) + waiting(batch))]
    return Room(limits, "memory and half of the free scratch space", "memory= and scratch= give more, ")


def in_memory(memory: int | str | None, device: torch.device | str | None, model: nn.Module, holders: int = 1) -> Room:
    """Room for images that `holders` processes hold in host memory: `memory` if the model runs there, else half of it.

    Raises ValueError as `parse_memory` does.
    """
    on_host = (Network(model).device if device is None else torch.device(device)).type == "cpu"
    size = parse_memory(memory if on_host else None, torch.device("cpu")) // holders
    return Room([(size, bytes_of)], "memory", "memory= gives more, " if on_host else "")


def bytes_of(batch: Any) -> int:
    """The bytes of all tensors and arrays in a nest of tuples, lists and dicts."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch.nbytes
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return sum(map(bytes_of, parts))
