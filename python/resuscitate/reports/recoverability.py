"""The recoverability map: scores by sparsity, allocation and method, and the regime in which only a method holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import CheckpointError, did_you_mean
from .base import Report, terminal_table


@dataclass(frozen=True)
class Cell:
    """One model, pruned, repaired and scored."""

    sparsity: float  # as requested
    allocation: str
    method: str
    score: float  # of `evaluate`
    pruned: float  # the sparsity that was reached
    seconds: float  # of the repair; of a regrowth with the pruning before it


class Transition(NamedTuple):
    """Sparsities from `start` to `end`; where `open`, the repair still held at the largest that was measured."""

    start: float
    end: float
    open: bool

    def __str__(self) -> str:
        return f"{self.start:.3f} to {'beyond ' * self.open}{self.end:.3f}"


@dataclass(frozen=True)
class RecoverabilityMap(Report):
    """The cells of a map, in the order of sparsity.

    `dense`: the score of the dense network; `chance`: that of guessing. `images`: how many were read; a column may use
    fewer.
    """

    columns: ClassVar[Sequence[str]] = *(each.name for each in fields(Cell)), "dense", "chance", "pattern", "images"

    cells: list[Cell]
    dense: float
    chance: float
    pattern: str
    images: int

    @property
    def sparsities(self) -> list[float]:
        """The sparsities of the cells, ascending."""
        return sorted({cell.sparsity for cell in self.cells})

    @property
    def allocations(self) -> list[str]:
        """The allocations, in the order of the cells."""
        return list(dict.fromkeys(cell.allocation for cell in self.cells))

    @property
    def methods(self) -> list[str]:
        """The labels of the methods, in the order of the cells."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    def curve(self, allocation: str, method: str) -> dict[float, float]:
        """{sparsity: score}, ascending. Raises ValueError for a name that is not in the map."""
        for option, value, known in (("allocation", allocation, self.allocations), ("method", method, self.methods)):
            if value not in known:
                hint = did_you_mean(value, known)
                raise ValueError(f"{option} {value!r} is not in the map, which has {', '.join(known)}{hint}")
        mine = [cell for cell in self.cells if (cell.allocation, cell.method) == (allocation, method)]
        return {cell.sparsity: cell.score for cell in sorted(mine, key=lambda cell: cell.sparsity)}

    def limit(self, allocation: str, method: str) -> float | None:
        """The first sparsity at which a method has lost half of the dense model's lead over chance; None if none is.

        By straight lines between the sparsities that were measured, from the dense score at 0.
        """
        half = self.chance + (self.dense - self.chance) / 2
        last, above = 0.0, self.dense
        for sparsity, score in self.curve(allocation, method).items():
            if score < half:
                return last + (sparsity - last) * (above - half) / (above - score)
            last, above = sparsity, score
        return None

    def transition(self, allocation: str, method: str, baseline: str = "bn") -> Transition | None:
        """The transition regime: where `baseline` has lost more than half of its lead over chance and `method` has not.

        From the `limit` of the baseline to that of the method, or, open, to the largest sparsity measured; or None.
        """
        start, end = self.limit(allocation, baseline), self.limit(allocation, method)
        if start is None or (end is not None and end <= start):
            return None
        return Transition(start, max(self.sparsities) if end is None else end, end is None)

    def best(self, sparsity: float, method: str) -> str:
        """The allocation of the highest score; the first named among equals."""
        return max(self.allocations, key=lambda allocation: self.curve(allocation, method)[sparsity])

    def rows(self) -> list[dict[str, Any]]:
        """One row for each cell."""
        return [vars(self) | vars(cell) for cell in self.cells]

    @classmethod
    def load(cls, path: str | Path) -> RecoverabilityMap:
        """Read the .json again. Raises OSError, or CheckpointError for a file of another kind."""
        try:
            plain: dict[str, Any] = json.loads(Path(path).read_text())
            return cls(**{**plain, "cells": [Cell(**cell) for cell in plain["cells"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: holds no recoverability map ({error})") from error

    def __rich_console__(self, *_: object) -> Iterator[Any]:
        from rich.markup import escape

        yield f"dense {self.dense:.2f}, chance {self.chance:g}, {self.pattern}, {self.images} images"
        for method in self.methods:
            curves = [self.curve(allocation, method) for allocation in self.allocations]
            rows = [
                [f"{sparsity:.1%}", *(f"{curve[sparsity]:.2f}" if sparsity in curve else "" for curve in curves)]
                for sparsity in self.sparsities
            ]
            yield terminal_table([escape(method)], self.allocations, rows)
        if "bn" in self.methods:
            yield from map(escape, self.findings())

    def findings(self, baseline: str = "bn") -> Iterator[str]:
        """A line for each method and allocation that has a transition regime."""
        for method, allocation in product(self.methods, self.allocations):
            if method != baseline and (found := self.transition(allocation, method, baseline)) is not None:
                yield f"{allocation}: {method} still holds where {baseline} fails, sparsity {found}"
