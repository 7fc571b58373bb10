"""A time limit for a run that can be continued by another run."""

from __future__ import annotations

import time


class Budget:
    """Is there time for one more piece of work? The estimate of its time is the longest piece so far.

    The first piece is always allowed, so that repeated runs finish the work.
    """

    def __init__(self, seconds: float | None) -> None:
        self.last = time.monotonic()
        self.end = None if seconds is None else self.last + seconds
        self.longest = 0.0
        self.begun = False

    def another(self) -> bool:
        """True if the next piece may start; to be called before each piece."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last if self.begun else 0.0), now
        first, self.begun = not self.begun, True
        return first or self.end is None or now + self.longest <= self.end
