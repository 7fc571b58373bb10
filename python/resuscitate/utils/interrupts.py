"""Delays an interrupt (SIGINT) until a model is restored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class Interrupts:
    """After `begin` an interrupt raises KeyboardInterrupt as usual; between `hold` and `release` it is delayed."""

    def __init__(self) -> None:
        self._came = self._held = False
        self._before: Any = None

    def hold(self) -> None:
        """Delay interrupts from here on."""
        self._held = True

    def begin(self) -> None:
        """Install the signal handler, in the main thread: Python interrupts no other."""
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._before = signal.signal(signal.SIGINT, self._take)

    def release(self, undo: Callable[[], object]) -> None:
        """Restore the handler from before `begin`; if an interrupt came, call `undo` and raise KeyboardInterrupt."""
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
