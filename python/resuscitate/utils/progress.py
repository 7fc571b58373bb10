"""Progress where standard error is a terminal, a line for each work within another; a stopwatch: seconds by stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_displays: list[Any] = []  # the display on the terminal, if there is one: work within other work adds a line to it


@contextmanager
def progress_line(title: str, total: int, show: bool | None = None) -> Iterator[Callable[..., None] | None]:
    """A line with a title, a bar, the time left and a note; gives a function that updates it, see `Bar`.

    None where nothing is shown. `show=None`: only where standard error is a terminal; True: in a pipe too.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    with ExitStack() as stack:
        if not _displays:
            _displays.append(stack.enter_context(_new_display(show)))
            stack.callback(_displays.clear)
        display = _displays[0]
        line = display.add_task(title, total=total, note="")
        stack.callback(display.remove_task, line)
        stack.callback(display.refresh)  # so that the last state is seen, however short the work
        yield lambda **changes: display.update(line, **changes)


def _new_display(show: bool | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # on a narrow terminal the description, which may have a long name, is cut off, and nothing else
    left, bar, note = (Column(no_wrap=True, min_width=width) for width in (7, 16, 0))
    description = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (
        TimeRemainingColumn(table_column=left),
        BarColumn(16, table_column=bar),
        TextColumn("{task.description}", table_column=description),
        TextColumn("{task.fields[note]}", table_column=note),
    )
    return Progress(*columns, console=Console(stderr=True, force_terminal=show), transient=True, expand=True)


class Bar:
    """A context that shows which layer of how many, the time left, and what was last done to a layer.

    Where there is one name only: which image of how many. `show`: see `progress_line`. Without output it costs nothing.
    """

    def __init__(self, title: str, names: Sequence[str], images: int, show: bool | None = None) -> None:
        self.title, self.images, self.show = title, max(images, 1), show
        self.place = {name: index for index, name in enumerate(names)}
        self.at, self.here = "", 0
        self._stack = ExitStack()
        self._update: Callable[..., None] | None = None

    def __enter__(self) -> Bar:
        self._update = self._stack.enter_context(progress_line(self.title, len(self.place), self.show))
        return self

    def __exit__(self, *error: Any) -> None:
        self._update = None
        self._stack.close()

    def advance(self, name: str, images: int) -> None:
        """So many more images have reached this layer, or passed the step of this name."""
        if self._update is None:
            return
        if name != self.at:
            self.at, self.here = name, 0
        self.here += images
        before = self.place.get(name, 0)
        where = f"{before + 1}/{len(self.place)} {name}" if name in self.place and len(self.place) > 1 else name
        where += "" if len(self.place) > 1 else f", image {self.here:,}/{self.images:,}"
        completed = before + min(self.here / self.images, 1.0)
        self._update(completed=completed, description=f"{self.title}: {where}")

    def note(self, text: str) -> None:
        """Show this beside the bar."""
        if self._update is not None:
            self._update(note=text)


def track(items: Iterable[T], title: str, total: int, show: bool | None = None) -> Iterator[T]:
    """Yield the items behind a line of progress; `show`: see `progress_line`."""
    with progress_line(title, total, show) as update:
        for index, item in enumerate(items):
            if update is not None:
                update(completed=index, description=f"{title}: {index + 1}/{total}")
            yield item


class Stopwatch:
    """Seconds by stage; a stage begins where the last one ended."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """This stage ends now."""
        now = time.perf_counter()
        self.stages[stage], self._since = now - self._since, now
