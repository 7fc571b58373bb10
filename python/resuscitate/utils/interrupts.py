"""SIGINT while things are put back: it waits until they are."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class Interrupts:
    """From `begin` an interrupt raises KeyboardInterrupt as ever, from `hold` it waits, until `release`.

    Python interrupts the main thread only; in another there is nothing to do.
    """

    def __init__(self) -> None:
        self._came = self._held = False
        self._before: Any = None

    def hold(self) -> None:
        """Let no interrupt through from here on."""
        self._held = True

    def begin(self) -> None:
        """Take charge of them."""
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._before = signal.signal(signal.SIGINT, self._take)

    def release(self, undo: Callable[[], object]) -> None:
        """Let them through again; if one came, `undo` and raise it."""
        try:
            if self._before is not None:
                signal.signal(signal.SIGINT, self._before)
            came = self._came
        except KeyboardInterrupt:
            came = True
        if came:
            undo()
            raise KeyboardInterrupt

    def _take(self, number: int, frame: Any) -> None:
        if self._held:
            self._came = True
        else:
            self._before(number, frame)
