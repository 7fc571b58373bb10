"""Batches of images: kept between passes, counted, cut where a step ends, cut again into batches of another size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..runtime.activations import Frame, Store
from ..runtime.distributed import Ranks
from ..utils.digest import image_keys
from ..utils.nested import copied, count_images
from .augment import Augment, augmented
from .calibration import read_batches
from .checks import warn_of_padding

HELD_OUT, FEWEST_HELD_OUT = 10, 32  # one of so many images is left out of a fit, but no fewer than so many


class _Part(NamedTuple):
    """A batch as some rows of one that was read, by its number; `draw` is the number of a changed copy."""

    source: int
    rows: Tensor | None = None
    draw: int | None = None


class Batches:
    """Batches that can be read any number of times: those that the caller holds as they are, others kept in `store`.

    `held_out`: how many of the batches, the last ones, hold images that are left out of a fit.
    """

    def __init__(self, source: Iterable[Any], store: Store | None = None) -> None:
        self.counts: list[int] = []
        self.held_out = 0
        self._keys: list[Tensor] = []
        self._turns: Sequence[Tensor] = ()
        self._folds: dict[tuple[int, int, int], dict[int, Tensor]] = {}  # the results of `folds`
        self._kept: list[Any] = []
        self._parts: list[_Part] = []
        self._augment: Augment | None = None
        for batch in source:
            self._parts.append(_Part(len(self._kept)))
            self.counts.append(count_images(batch))
            if store is None:
                self._kept.append(batch)
            else:
                self._kept.append(Frame(store))
                self._kept[-1].close({0: copied(batch)})  # a loader may use the same memory for each batch

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> Any:
        part = self._parts[index]
        batch = self._kept[part.source]
        if isinstance(batch, Frame):
            value = batch.open([0])
            batch.close({}, keep=[0])
            batch = value[0]
        batch = batch if part.rows is None else take(batch, part.rows)
        if part.draw is None or self._augment is None:
            return batch
        return augmented(batch, self._augment, part.draw, self._keys[index])

    def head(self, batches: int | None = None) -> Iterator[Any]:
        """The first so many batches, one after the other; None for all."""
        return (self[index] for index in range(len(self))[:batches])

    def images(self, batches: int | None = None) -> int:
        """How many images the first so many batches hold; None for all."""
        return sum(self.counts[:batches])

    def different(self, ranks: Ranks, batches: int | None = None) -> int:
        """How many images of all ranks differ by their contents, in the first so many batches; None for all.

        A changed copy counts as its image.
        """
        self._make_keys()
        own = torch.cat([torch.zeros(0, dtype=torch.int64), *self._keys[:batches]])
        return len(torch.cat(ranks.gather(own)).unique())

    def hold_out(self, ranks: Ranks) -> None:
        """Move a tenth of the images of all ranks, and no fewer than 32, into batches of their own, the last ones.

        They are chosen by their contents, as in `number_images`. None, where 32 are more than a quarter of all. The
        batches must be tensors.
        """
        if (total := ranks.total(self.images())[0]) < 4 * FEWEST_HELD_OUT:
            return
        every = min(HELD_OUT, total // FEWEST_HELD_OUT)
        chosen = [turns % every == every - 1 for turns in self._order(range(len(self)), ranks)]
        fitted, held = (
            [_Part(index, rows) for index, each in enumerate(chosen) if len(rows := (each == out).nonzero().flatten())]
            for out in (False, True)
        )
        parts, self.held_out = fitted + held, len(held)
        self._keys = [self._keys[part.source][part.rows] for part in parts]
        self._parts, self.counts = parts, [len(keys) for keys in self._keys]

    def augment(self, augment: Augment, draws: int) -> None:
        """Follow each batch that is not held out by `draws` changed copies of it; see `augmented`.

        A copy is in the same fold as its image. It is made anew each time that it is read.
        """
        self._make_keys()
        fitted = len(self) - self.held_out
        places = [(index, draw) for index in range(fitted) for draw in (None, *range(draws))]
        places += [(index, None) for index in range(fitted, len(self))]
        self._parts, self._augment = [self._parts[index]._replace(draw=draw) for index, draw in places], augment
        self.counts, self._keys = (
            [self.counts[index] for index, _ in places],
            [self._keys[index] for index, _ in places],
        )

    def number_images(self, ranks: Ranks) -> None:
        """Number the images of all ranks by their contents, so that `folds` depends on no order, batches or ranks."""
        self._turns, self._folds = self._order(range(len(self) - self.held_out), ranks), {}

    def sample(self, images: int, ranks: Ranks) -> dict[int, Tensor]:
        """Which rows of which batches are the first `images` of all ranks by contents, see `numbers`."""
        found = {index: rows[numbers < images] for index, (rows, numbers) in self.numbers(ranks).items()}
        return {index: rows for index, rows in found.items() if len(rows)}

    def numbers(self, ranks: Ranks) -> dict[int, tuple[Tensor, Tensor]]:
        """By batch, rows and their numbers by contents over all ranks. Equal images are there once, on one rank.

        None is held out, and none is a changed copy.
        """
        chosen = [index for index, part in enumerate(self._parts[: len(self) - self.held_out]) if part.draw is None]
        found = {}
        for index, numbers in zip(chosen, self._order(chosen, ranks, once=True), strict=True):
            rows = (numbers >= 0).nonzero().flatten()
            found[index] = rows, numbers[rows]
        return found

    def _order(self, batches: Sequence[int], ranks: Ranks, once: bool = False) -> Sequence[Tensor]:
        """For each of these batches, the places of its images in an order of all ranks' different images by contents.

        Equal images have one place; `once`: all but the first of them have -1.
        """
        self._make_keys()
        own = torch.cat([torch.zeros(0, dtype=torch.int64), *(self._keys[index] for index in batches)])
        by_rank = ranks.gather(own)
        keys, places = torch.cat(by_rank).unique(return_inverse=True)
        if once:
            at = torch.arange(len(places))
            first = torch.full_like(keys, len(places)).scatter_reduce(0, places, at, "amin")
            places = torch.where(first[places] == at, places, -1)
        places = places.split([len(each) for each in by_rank])[ranks.rank]
        return places.split([self.counts[index] for index in batches])

    def _make_keys(self) -> None:
        """Set the keys of the images by their contents, before any are moved to other batches or copied."""
        if not self._keys:
            self._keys = [torch.tensor(image_keys(batch)) for batch in self.head()]

    def folds(self, index: int, folds: int, rows: int) -> dict[int, Tensor]:
        """Which of a batch's rows, int64, belong to each fold: image number i is in fold i modulo `folds`.

        The rows follow one another as the images do, as many to each: they may be windows, or positions.
        """
        if (index, folds, rows) not in self._folds:
            turns = self._turns[index]
            fold = turns[torch.arange(rows) * len(turns) // max(rows, 1)] % folds
            found = {each: (fold == each).nonzero().flatten() for each in fold.unique().tolist()}
            self._folds[index, folds, rows] = found
        return self._folds[index, folds, rows]

    def batches_for(self, images: int | None) -> int:
        """How many whole batches hold the first `images` images, or at least so many; None for all."""
        if images is None:
            return len(self)
        return min(sum(before < images for before in accumulate(self.counts, initial=0)), len(self))

    def batches_of(self, read: int) -> int:
        """How many of the batches, the first ones, are of the first `read` that were read; none is held out."""
        return sum(part.source < read for part in self._parts[: len(self) - self.held_out])


def take(batch: Tensor, rows: Tensor) -> Tensor:
    """Some rows, int64 (R,) on the host, of a batch, without a wait for its device."""
    return batch[rows.to(batch.device, non_blocking=True)]


def read_share(calibration: Any, ranks: Ranks, *, max_samples: int | None, **options: Any) -> Iterable[Any]:
    """This rank's share of `max_samples` images, which may be none, by `read_batches`. Raises CalibrationError."""
    share = ranks.share(max_samples)
    if ranks.size > 1 and ranks.rank == 0:
        warn_of_padding(calibration)
    return () if share == 0 else read_batches(calibration, max_samples=share, allow_empty=ranks.size > 1, **options)


def most_images(wanted: Sequence[int | None], max_samples: int | None) -> int | None:
    """How many images to read: as many as any step wants, at most `max_samples`; None for all."""
    known = [count for count in wanted if count is not None]
    most = max(known, default=None) if len(known) == len(wanted) else None
    return min((limit for limit in (most, max_samples) if limit is not None), default=None)


def cut(batches: Iterable[Any], marks: Iterable[int | None]) -> Iterator[Any]:
    """Split each tensor in which image number `mark` lies, so that a batch ends there."""
    ends = sorted({mark for mark in marks if mark})
    seen = 0
    for batch in batches:
        count = count_images(batch)
        if isinstance(batch, Tensor):
            inside = [end - seen for end in ends if seen < end < seen + count]
            yield from batch.tensor_split(inside) if inside else [batch]
        else:
            yield batch
        seen += count


def rebatch(batches: Batches, size: int, count: int | None = None) -> Iterator[Tensor]:
    """The same images in the same order, in `count` batches of exactly `size` images (None: as many as there are).

    Images left over are not used. Raises CalibrationError, at once, if there are too few images; later, if images of
    two shapes share a batch.
    """
    available, least = batches.images(), count or 1
    if available < size * least:
        raise CalibrationError(
            f"{least} batches of {size} need {size * least} images and there are {available}; "
            "pass more calibration images, fewer batches or a smaller batch size"
        )
    return islice(_rebatch(cut(batches.head(), range(size, available + 1, size)), size), count)


def _rebatch(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Pieces joined to batches of `size` images; no piece may reach beyond the end of a batch."""
    held: list[Tensor] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) == size:
            if len({each.shape[1:] for each in held}) > 1:
                shapes = " and ".join(str(tuple(each.shape[1:])) for each in held)
                problem = f"images of shapes {shapes} cannot share a batch of {size}"
                raise CalibrationError(f"{problem}; bring them to one size")
            yield held[0] if len(held) == 1 else torch.cat(held)
            held = []
