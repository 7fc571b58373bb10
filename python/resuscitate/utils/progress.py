"""A progress bar where standard error is a terminal, and a stopwatch: seconds by stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """A context that shows which layer of how many, which image of how many, images per second and the time left.

    `show=None`: only where standard error is a terminal. Without output it costs nothing.
    """

    def __init__(self, title: str, names: Sequence[str], images: int, show: bool | None = None) -> None:
        self.title, self.images, self.show = title, max(images, 1), show
        self.place = {name: index for index, name in enumerate(names)}
        self.at, self.here, self.seen, self.started = "", 0, 0, time.perf_counter()
        self._progress: Any = None

    def __enter__(self) -> Bar:
        if _shown(self.show):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            console = Console(stderr=True, force_terminal=self.show)  # True: in a pipe too
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=len(self.place))
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, name: str, images: int) -> None:
        """So many more images have reached this layer, or passed the step of this name."""
        if self._progress is None:
            return
        if name != self.at:
            self.at, self.here = name, 0
        self.here += images
        self.seen += images
        rate = self.seen / max(time.perf_counter() - self.started, 1e-9)
        before = self.place.get(name, 0)
        where = f"{before + 1}/{len(self.place)} {name}" if name in self.place else name
        where += f", image {self.here:,}/{self.images:,}"
        completed = before + min(self.here / self.images, 1.0)
        self._progress.update(self._task, completed=completed, description=f"{self.title}: {where}, {rate:,.0f}/s")


def track(items: Iterable[T], title: str, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield the items behind a progress bar on standard error; `show=None`: only where that is a terminal."""
    if not _shown(show):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, title, total=total, console=Console(stderr=True), transient=True)


def _shown(show: bool | None) -> bool:
    return sys.stderr.isatty() if show is None else show


class Stopwatch:
    """Seconds by stage; a stage begins where the last one ended."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """This stage ends now."""
        now = time.perf_counter()
        self.stages[stage], self._since = now - self._since, now
