"""Progress on a terminal, silence in a pipe; seconds by stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """Progress on standard error: which stop of how many, which image of how many, images per second, time left.

    `show=None`: only where standard error is a terminal. A context manager; silent ones cost nothing.
    """

    def __init__(self, title: str, stops: Sequence[str], images: int, show: bool | None = None) -> None:
        self.title, self.images = title, max(images, 1)
        self.place = {name: index for index, name in enumerate(stops)}
        self.shown = sys.stderr.isatty() if show is None else show
        self.forced = show  # who asks for it gets it in a pipe too
        self.at, self.here, self.seen, self.started = "", 0, 0, time.perf_counter()
        self._progress: Any = None

    def __enter__(self) -> Bar:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            self._progress = Progress(
                text,
                BarColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True, force_terminal=self.forced),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=len(self.place))
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, stop: str, images: int) -> None:
        """So many more images have come to this stop, or through what else is named."""
        if self._progress is None:
            return
        if stop != self.at:
            self.at, self.here = stop, 0
        self.here += images
        self.seen += images
        rate = self.seen / max(time.perf_counter() - self.started, 1e-9)
        before = self.place.get(stop, 0)
        where = f"{before + 1}/{len(self.place)} {stop}" if stop in self.place else stop
        where += f", image {self.here:,}/{self.images:,}"
        completed = before + min(self.here / self.images, 1.0)
        self._progress.update(self._task, completed=completed, description=f"{self.title}: {where}, {rate:,.0f}/s")


def track(items: Iterable[T], title: str, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield the items behind a progress bar on standard error; `show=None`: only where that is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, title, total=total, console=Console(stderr=True), transient=True)


class Stopwatch:
    """Seconds by stage; a stage begins where the last one ended."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """This stage ends now."""
        now = time.perf_counter()
        self.stages[stage], self._since = now - self._since, now
