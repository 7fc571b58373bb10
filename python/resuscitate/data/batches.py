"""Batches of images: kept between passes, counted, cut where a step ends, cut again into batches of another size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..runtime.activations import Frame, Store
from ..runtime.distributed import Ranks
from ..utils.digest import image_keys
from .calibration import check_count, first_tensor, read_batches
from .checks import warn_of_padding

if TYPE_CHECKING:
    from ..engine.room import Room


class Batches:
    """Batches that can be read again and again: those in the caller's hands as they are, others kept in `store`.

    to_deal: note what `deal` needs while the images come by.
    """

    def __init__(self, source: Iterable[Any], store: Store | None = None, to_deal: bool = False) -> None:
        self.counts: list[int] = []
        self._keys: list[int] = []
        self._turns: Sequence[Tensor] = ()
        self._kept: list[Any] = []
        for batch in source:
            self.counts.append(count_images(batch))
            if to_deal:
                self._keys += image_keys(batch)
            if store is None:
                self._kept.append(batch)
            else:
                frame = Frame(store)
                frame.close({0: _compact(batch)})
                self._kept.append(frame)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> Any:
        batch = self._kept[index]
        if not isinstance(batch, Frame):
            return batch
        value = batch.open([0])
        batch.close({}, keep=[0])
        return value[0]

    def head(self, batches: int | None = None) -> Iterator[Any]:
        """The first so many batches, one after the other; None for all."""
        return (self[index] for index in range(len(self) if batches is None else min(batches, len(self))))

    def images(self, batches: int | None = None) -> int:
        """How many images the first so many batches hold; None for all."""
        return sum(self.counts[:batches])

    def deal(self, ranks: Ranks) -> None:
        """Number the images of all ranks by their contents, so that neither order, batches nor ranks matter."""
        own = torch.tensor(self._keys, dtype=torch.int64)
        self._turns = torch.searchsorted(torch.cat(ranks.gather(own)).sort().values, own).split(self.counts)

    def folds(self, index: int, folds: int, rows: int) -> dict[int, Tensor]:
        """Which of a batch's rows, int64, belong to each fold of the images: number i, once they are dealt, to i modulo
        `folds`. The rows follow one another as the images do, as many to each: they may be windows, or positions.
        """
        turns = self._turns[index]
        fold = turns[torch.arange(rows) * len(turns) // max(rows, 1)] % folds
        return {each: (fold == each).nonzero().flatten() for each in fold.unique().tolist()}

    def holding(self, images: int | None) -> int:
        """How many whole batches hold the first `images` images, or at least so many; None for all."""
        if images is None:
            return len(self)
        return min(sum(seen < images for seen in accumulate([0, *self.counts[:-1]])), len(self))


def read_share(
    calibration: Any,
    ranks: Ranks,
    *,
    max_samples: int | None,
    max_batches: int | None,
    batch_size: int,
    raw: bool,
    room: Room | None = None,
) -> Iterable[Any]:
    """This rank's batches by `read_batches`: its share of `max_samples`, which may be none; all else is its own.

    Raises CalibrationError.
    """
    check_count("max_samples", max_samples)
    share = ranks.share(max_samples)
    if ranks.size > 1 and ranks.rank == 0:
        warn_of_padding(calibration)
    if share == 0:
        return ()
    options: dict[str, Any] = {"max_batches": max_batches, "batch_size": batch_size, "raw": raw, "room": room}
    return read_batches(calibration, max_samples=share, allow_empty=ranks.size > 1, **options)


def count_images(batch: Any) -> int:
    """How many images a batch holds: the length of its first tensor."""
    tensor = first_tensor(batch)
    return 1 if tensor is None else len(tensor)


def most_images(wanted: Sequence[int | None], max_samples: int | None) -> int | None:
    """How many images to read: as many as any step wants, at most `max_samples`; None for all."""
    limits = [max(known)] if (known := [w for w in wanted if w is not None]) and len(known) == len(wanted) else []
    limits += [] if max_samples is None else [max_samples]
    return min(limits, default=None)


def cut(batches: Iterable[Any], marks: Iterable[int | None]) -> Iterator[Any]:
    """Split each batch in which image number `mark` lies, so that a run of whole batches ends there."""
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
    """The same images in the same order, cut again into exactly `count` batches of `size` (None: all whole batches).

    For what depends on its batches, such as a momentum (EMA) recalibration. What is left over is unused. Raises
    CalibrationError, before the first, if there are too few images, and when images of different shapes would have to
    share a batch.
    """
    available = batches.images()
    if size < 1 or (count is not None and count < 1):
        raise CalibrationError(f"a number of batches and their size must be at least 1, not {count} of {size}")
    if available < size * (count or 1):
        raise CalibrationError(
            f"{count or 1} batches of {size} need {size * (count or 1)} images and there are {available}; "
            "pass more calibration images, fewer batches or a smaller batch size"
        )
    return _rebatch(batches, size, available // size if count is None else count)


def _rebatch(batches: Batches, size: int, count: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for batch in batches.head():
        while len(batch):
            missing = size - sum(map(len, held))
            held.append(batch[:missing])
            batch = batch[missing:]
            if sum(map(len, held)) < size:
                continue
            if len({piece.shape[1:] for piece in held}) > 1:
                shapes = " and ".join(str(tuple(piece.shape[1:])) for piece in held)
                raise CalibrationError(
                    f"images of shapes {shapes} cannot share a batch of {size}; bring them to one size"
                )
            yield held[0] if len(held) == 1 else torch.cat(held)
            held, count = [], count - 1
            if not count:
                return


def first_images(batch: Any, images: int = 2) -> Any:
    """A small batch to look at a network with; one that is no tensor goes whole: see `Network.example`."""
    return batch[:images] if isinstance(batch, Tensor) else batch


def _compact(batch: Any) -> Any:
    """A tensor that is a part of a larger memory as a copy of its own, lest the whole be kept."""
    if isinstance(batch, Tensor) and batch.untyped_storage().nbytes() > batch.numel() * batch.element_size():
        return batch.clone()
    return batch
