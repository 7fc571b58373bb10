"""The bytes that the calibration images of a loader may take: reading stops at the first batch that does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger("resuscitate")
MANY = 10_000


class Room:
    """Bytes that all batches together may take; reading stops at the first batch that takes more than is left.

    limits: pairs of a number of bytes, and of a function from a batch to the number that it takes of them.
    lacking, remedy: for the log, what has no room for more, and the remedy.
    """

    def __init__(self, limits: Sequence[tuple[int, Callable[[Any], int]]], lacking: str, remedy: str) -> None:
        self.left, self.costs = [size for size, _ in limits], [cost for _, cost in limits]
        self.lacking, self.remedy = lacking, remedy

    def take(self, batch: Any) -> bool:
        """Take the bytes of a batch, if so many are left."""
        left = [size - cost(batch) for size, cost in zip(self.left, self.costs, strict=True)]
        if fits := min(left) >= 0:
            self.left = left
        return fits

    def hint(self, total: int | None) -> None:
        """Log how to be faster, for a user who gave no limit and has many images."""
        if total is not None and total > MANY:
            log.info("all %s images of the loader are read, if there is room; max_samples= takes fewer", f"{total:,}")

    def warn(self, used: int, total: int | None) -> None:
        """Warn that reading ends after `used` images of `total`, which is None where it is unknown."""
        count = f"{used:,}" if total is None else f"{used:,} of {total:,}"
        log.warning(
            "only the first %s images are used: there is no room for more in %s; %smax_samples= says how many to take",
            *(count, self.lacking, self.remedy),
        )
