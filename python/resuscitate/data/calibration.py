"""Reads batches of images of any usual kind, as many as limits on their number and on memory allow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import CalibrationError
from ..runtime.options import check_count
from ..utils.nested import as_tensor, copied, images_of
from .checks import labels_of, warn_of_class_order

log = logging.getLogger("resuscitate")

Calibration = Tensor | np.ndarray | Iterable[Any] | Callable[[], Iterable[Any]]

INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x")
MANY = 10_000  # images of a loader, of which a user may want fewer


class Room:
    """Bytes that all batches together may take; reading stops at the first batch that takes more than is left.

    limits: pairs of a number of bytes, and of a function from a batch to the number that it takes of them.
    lacking, remedy: for the log, what has no room for more, and the remedy.
    """

    def __init__(self, limits: Sequence[tuple[int, Callable[[Any], int]]], lacking: str, remedy: str) -> None:
        self.left, self.costs = [size for size, _ in limits], [cost for _, cost in limits]
        self.lacking, self.remedy = lacking, remedy

    def take(self, batch: Any) -> bool:
        """Take the bytes of a batch, if so many are left."""
        left = [size - cost(batch) for size, cost in zip(self.left, self.costs, strict=True)]
        if fits := min(left) >= 0:
            self.left = left
        return fits

    def warn(self, used: int, total: int | None) -> None:
        """Warn that reading ends after `used` images of `total`, which is None where it is unknown."""
        count = f"{used:,}" if total is None else f"{used:,} of {total:,}"
        log.warning(
            "only the first %s images are used: there is no room for more in %s; %smax_samples= says how many to take",
            *(count, self.lacking, self.remedy),
        )


def read_batches(
    calibration: Calibration,
    *,
    max_samples: int | None = None,
    max_batches: int | None = None,
    batch_size: int = 128,
    raw: bool = False,
    allow_empty: bool = False,
    room: Room | None = None,
) -> Iterator[Any]:
    """The batches' input tensors, (n, ...) each, one after the other: never changed and not copied.

    calibration: a tensor or array (N, ...), split into `batch_size`; an iterable, sized or not, of batches that
        `input_of` understands; or a function of no arguments that returns one of these.
    max_samples, max_batches: limits, both always honoured. The last tensor is cut so that exactly `max_samples` images
        are used, and nothing is read beyond the batch that reaches a limit.
    raw: yield the batches as they came, for a user's own `forward_fn`. They are whole: reading stops with the batch
        that reaches `max_samples`, counted as `count_images` does.
    allow_empty: have no batches at all without an error, as one of several ranks may.
    room: end, with a warning in the log, at the first batch that takes more memory than is left. None, and for a
        tensor, array, list or tuple, which the caller holds anyway: no such limit.
    Raises CalibrationError: a limit below 1 (at once); no batches, a batch of an unknown kind or without images.
    """
    for option, given in (("max_samples", max_samples), ("max_batches", max_batches), ("batch_size", batch_size)):
        check_count(option, given)
    source = calibration() if callable(calibration) and not isinstance(calibration, Iterable) else calibration
    batches = _iterate(source, batch_size, max_samples)
    limit = None if is_held(source) else room

    def read() -> Iterator[Any]:
        samples, total, dimensions, labels = 0, None, set[int](), list[np.ndarray]()
        for index, batch in enumerate(batches):
            try:
                images = images_of(batch) if raw else input_of(batch)
                count = 0 if images is None else _count(images)
            except CalibrationError as error:
                raise CalibrationError(f"batch {index}: {error}") from None
            dimensions.add(images.ndim if isinstance(images, Tensor) else 0)
            if not raw and len(dimensions) > 1:
                raise CalibrationError(
                    f"the batches differ in their number of dimensions ({', '.join(map(str, sorted(dimensions)))}); "
                    "an (images, labels) pair is one batch: put it in a list"
                )
            if limit is not None and index == 0:
                total = _total(source, count, max_samples, max_batches)
                if max_samples is None and max_batches is None and total is not None and total > MANY:
                    hint = "all %s images of the loader are read, if there is room; max_samples= takes fewer"
                    log.info(hint, f"{total:,}")
            left = count if max_samples is None else max_samples - samples
            part = batch if raw else images if images is None or count <= left else images[:left]
            if limit is not None and not limit.take(part) and index:
                warn_of_class_order(labels)
                limit.warn(samples, total)
                return
            labels.append(labels_of(batch, count))
            yield part
            samples += count
            if index + 1 == max_batches or (max_samples is not None and samples >= max_samples):
                warn_of_class_order(labels)
                return
        if not dimensions and not allow_empty:
            cause = "the calibration data is empty"
            if isinstance(source, Iterator):
                remedy = "pass a list, a DataLoader, or a function that returns a new iterator"
                cause = f"the iterator is used up, as a generator is after one pass; {remedy}"
            raise CalibrationError(f"no batches: {cause}")

    return read()


def hold(calibration: Calibration, batches: Iterable[Any]) -> list[Any]:
    """The batches that were read from `calibration`, as a list that can be read any number of times."""
    # a loader may use the same memory for each batch
    return list(batches if is_held(calibration) else map(copied, batches))


def is_held(calibration: Any) -> bool:
    """Does the caller hold the batches, so that keeping them takes no memory?"""
    return isinstance(calibration, Tensor | np.ndarray | list | tuple)


def input_of(batch: Any) -> Tensor:
    """The input tensor of one batch: the tensor (or array); the first of a tuple or list; a known key of a dict.

    The keys are `INPUT_KEYS`, tried in that order. Raises CalibrationError, naming the type and keys, for another kind.
    """
    if isinstance(batch, Tensor | np.ndarray):
        return as_tensor(batch)
    if isinstance(batch, Mapping):
        for key in INPUT_KEYS:
            if key in batch:
                return input_of(batch[key])
    if isinstance(batch, tuple | list) and batch:
        return input_of(batch[0])
    raise CalibrationError(
        f"cannot find the images in a batch of kind {_describe(batch)}; give a tensor, a tuple or list that begins "
        f"with one, or a dict with one under {', '.join(INPUT_KEYS)}; or pass forward_fn=lambda model, batch: ..."
    )


def _iterate(source: Any, batch_size: int, max_samples: int | None) -> Iterator[Any]:
    if isinstance(source, Tensor | np.ndarray):
        if source.ndim == 0:
            raise CalibrationError("the calibration images are a tensor without dimensions; give (N, ...)")
        images = as_tensor(source if isinstance(source, Tensor) else source[:max_samples])
        return iter(images[:max_samples].split(batch_size) if len(images) else ())
    if isinstance(source, str | bytes | Path):
        raise CalibrationError(f"calibration is a path, {str(source)!r}; read it with resuscitate.load_images")
    if isinstance(source, Mapping):
        raise CalibrationError(f"calibration is one batch of kind {_describe(source)}; put it in a list")
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise CalibrationError("calibration is a Dataset of single images; pass DataLoader(dataset, 128, shuffle=True)")
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise CalibrationError(f"calibration must be a tensor or an iterable of batches, not {type(source).__name__}")
    return iter(source)


def _total(source: Any, batch: int, max_samples: int | None, max_batches: int | None) -> int | None:
    """How many images there are to read, in batches of so many; None where that is unknown."""
    known = [most for most in (max_samples, max_batches and max_batches * batch) if most is not None]
    with suppress(TypeError, NotImplementedError):  # of a loader without a length
        known.append(len(source) * batch)
        if getattr(source, "batch_sampler", None) is not None:  # the last batch may be short
            known.append(len(source.dataset))
    return min(known, default=None)


def _count(images: Tensor | np.ndarray | Sequence[Any]) -> int:
    if isinstance(images, Tensor) and images.ndim == 0:
        raise CalibrationError("its images are a tensor without dimensions; give (n, ...)")
    if len(images) == 0:
        raise CalibrationError(f"there are no images in it (shape {tuple(np.shape(images))})")
    return len(images)


def _describe(batch: Any) -> str:
    name = type(batch).__name__
    return f"{name} with keys {', '.join(map(repr, batch)) or 'none'}" if isinstance(batch, Mapping) else name
