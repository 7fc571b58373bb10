"""Images on disk, and their labels, as tensors: all at once, or batch by batch. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import CalibrationError
from .sources import Size, open_source

Channels = Sequence[float] | float | None


def load_images(
    path: str | Path,
    *,
    mean: Channels = None,
    std: Channels = None,
    size: Size = None,
    max_samples: int | None = None,
    seed: int | None = 0,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Images from disk as one float32 tensor (N, C, H, W): shuffled, then at most `max_samples` of them.

    path: an .npz (the array `images`, `x` or `data`, or its only one; or `jpeg`, JPEG files end to end, with the N + 1
        `offsets` where they begin and end), an .npy, or a folder of images, read recursively. Arrays are (N, H, W),
        (N, H, W, C) or (N, C, H, W), C being 1, 3 or 4. Or parquet as Hugging Face datasets write it (the `parquet`
        extra), or webdataset's .tar shards, a file or a folder of either. "parquet:data" and the like (folder, npz,
        npy, wds) say what it is. Image files become RGB and need the `images` extra.
    mean, std: (x - mean) / std per channel, after uint8 is divided by 255; floats are taken as they are. Give what
        the network was trained with.
    size: image files are resized and cropped about their centre to this height and width; None: they must agree.
    seed: of the shuffle, which comes before the limit because folders and many arrays are sorted by class. None keeps
        the order of the array, or of the sorted file names.
    shard: (k, n) for the k-th of n ranks, from 0: of all those images the k-th and every n-th after it. May be none.
    Raises CalibrationError, naming the file, for what cannot be read. Nothing is ever unpickled.
    """
    found = ImageStream(path, mean=mean, std=std, size=size, max_samples=max_samples, seed=seed, shard=shard)
    return found.head(found.images)


def load_labels(path: str | Path, *, max_samples: int | None = None, seed: int | None = 0) -> Tensor:
    """The int64 labels (N,), in the order of `load_images` with the same options.

    Of an .npz the array `labels` or `y`; of parquet the column `label`, `labels` or `fine_label`; of tar shards the
    .cls beside each image. Raises CalibrationError where there are none.
    """
    labels = open_source(path).labels
    if labels is None:
        raise CalibrationError(f"{path}: holds no labels; an .npz has them as `labels`")
    return torch.from_numpy(labels[_order(path, len(labels), max_samples, seed)].astype(np.int64))


class ImageStream(IterableDataset[Tensor]):
    """The images of `load_images` in batches, float32 (n, C, H, W), each read when it is asked for.

    Encoded files stay encoded; an .npz is held in memory, an .npy stays on disk. `DataLoader(stream, batch_size=None,
    num_workers=4)` reads in several processes, in the same order. Neither processes nor ranks (`shard`) read an image
    twice.
    """

    path: str | Path
    batch_size: int
    images: int
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 128,
        mean: Channels = None,
        std: Channels = None,
        size: Size = None,
        max_samples: int | None = None,
        seed: int | None = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """See `load_images`; batch_size: images a batch. Raises CalibrationError."""
        self.path, self.batch_size, self._source = path, batch_size, open_source(path, size)
        self._rows = _order(path, len(self._source), max_samples, seed)[shard[0] :: shard[1]]
        self.images = len(self._rows)
        given: tuple[Any, Any] = (0 if mean is None else mean, 1 if std is None else std)
        self.mean, self.std = (torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in given)
        if not bool((self.std > 0).all()):
            raise CalibrationError(f"{path}: mean={mean} and std={std}: std must be above 0")

    def __len__(self) -> int:
        """How many batches."""
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(first, len(self), step):
            yield self._read(self._rows[batch * self.batch_size : (batch + 1) * self.batch_size])

    def head(self, images: int) -> Tensor:
        """The first so many images, in one batch."""
        return self._read(self._rows[:images])

    def _read(self, rows: np.ndarray) -> Tensor:
        pixels = self._source.read(rows)
        scaled = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32)
        if pixels.dtype == np.uint8:
            scaled /= 255
        channels = scaled.shape[1]
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) not in (1, channels):
                raise CalibrationError(
                    f"{self.path}: {name} must be one number, or one for each of {channels} channels"
                )
        return scaled.sub_(self.mean).div_(self.std)


def _order(path: str | Path, total: int, limit: int | None, seed: int | None) -> np.ndarray:
    """Which images to take, in order: all of them, or a shuffled choice."""
    if total < 1:
        raise CalibrationError(f"{path}: holds no images")
    if limit is not None and limit < 1:
        raise CalibrationError(f"{path}: max_samples={limit} must be at least 1")
    return (np.arange(total) if seed is None else np.random.default_rng(seed).permutation(total))[:limit]
