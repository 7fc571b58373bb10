"""What reports have in common: plain data, files, and the undoing of what they report."""

from __future__ import annotations

import io
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..utils.files import write_rows
from .agreement import Agreement

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("resuscitate")


class Report(ABC):
    """A report. A subclass is a dataclass, and gives the `columns` and the `rows` of its table."""

    columns: ClassVar[Sequence[str]]

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table, by column; values of other names are left out of it."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return plain(self)

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write .json (everything, and `provenance`) or .csv (the rows), whole or not at all.

        Raises OSError; ValueError for another ending.
        """
        document = self.to_dict() | ({"provenance": dict(provenance)} if provenance else {})
        write_rows(path, document, self.columns, self.rows())


class UndoableReport(Report):
    """A report of a change to a model; `_undo` restores the model, and `work` names the change in messages.

    `agreement`: of the model's outputs with those of the dense network, if it was measured. `undone`: it fell, and so
    the change was undone.
    """

    work: ClassVar[str]
    _undo: Callable[[], None] | None = None
    agreement: Agreement | None = None
    undone: bool = False

    @abstractmethod
    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        """What `rich.print` shows: the table of the layers or steps, and the outcome."""

    def __str__(self) -> str:
        """What `rich.print` shows, as plain text."""
        return as_text(self)

    def undo(self) -> None:
        """Restore what the change has changed, bit for bit; what was changed later, elsewhere, stays.

        Undo several changes from the last to the first. Where the change was undone already, because it made the
        outputs worse, nothing is left to do. Raises RuntimeError the second time, ModelMismatchError for a module that
        has been replaced, or a parameter that has been removed since.
        """
        if self._undo is None:
            raise RuntimeError(f"this {self.work} has been undone already")
        self._undo()
        self._undo = None

    def undo_if_worse(self) -> None:
        """Undo a change that made the outputs worse, and say so; with too few images only say so."""
        if self.agreement is not None and self.agreement.fell:
            self.undo()
            self._undo = _nothing
            self.note_undone()
        else:
            self.warn_if_worse()

    def warn_if_worse(self) -> None:
        """Warn that a change which was kept seems to make the outputs worse."""
        if self.agreement is not None and self.agreement.worse:
            doubt = f"too few to undo the {self.work} for that; give more, or call undo()"
            log.warning("%s: the outputs seem to be worse, but these images are %s", self.agreement, doubt)

    def note_undone(self) -> None:
        """Note that the change was undone, because it made the outputs worse."""
        self.undone = True
        log.warning("%s; keep_worse=True keeps it", ": ".join(reversed(self.outcome())))

    def outcome(self) -> list[str]:
        """The agreement in words, and whether the change was undone."""
        undone = [f"the {self.work} was undone, because it made the outputs worse"] if self.undone else []
        return [*([str(self.agreement)] if self.agreement else []), *undone]


def _nothing() -> None:
    """The undoing of a change that was undone already."""


def as_text(part: Any) -> str:
    """What rich prints for an object, as plain text."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=console_width(), highlight=False).print(part)
    return text.getvalue().rstrip()


def console_width() -> int | None:
    """The width of a console of rich: a terminal's own, or one that cuts nothing off."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160


def terminal_table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for `rich.print`: columns of words, then columns of numbers; the rows have plain text."""
    from rich.markup import escape  # here, because rich takes longer to import than the rest of the package
    from rich.table import Column, Table

    table = Table(*words, *(Column(title, justify="right") for title in numbers), box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def plain(value: Any) -> Any:
    """A value as JSON can store it: tensors as lists, paths as strings, dataclasses as dicts."""
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value
