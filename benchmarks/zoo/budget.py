"""A limit on the time of a run that can be taken up again."""

from __future__ import annotations

import time


class Budget:
    """Is there time for one more piece of work? One is taken to last as long as the longest so far.

    The first is always done, so that a run that is started again and again comes to its end.
    """

    def __init__(self, seconds: float | None) -> None:
        self.last = time.monotonic()
        self.end = None if seconds is None else self.last + seconds
        self.longest = 0.0
        self.begun = False

    def another(self) -> bool:
        """Ask before each piece."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last if self.begun else 0.0), now
        first, self.begun = not self.begun, True
        return first or self.end is None or now + self.longest <= self.end
