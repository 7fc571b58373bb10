"""Where images come from: batches of any usual kind, arrays, and folders of image files."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .errors import CalibrationError

Calibration = Tensor | np.ndarray | Iterable[Any] | Callable[[], Iterable[Any]]

INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHANNELS = (1, 3, 4)


def read_batches(
    calibration: Calibration,
    *,
    max_samples: int | None = None,
    max_batches: int | None = None,
    batch_size: int = 128,
    raw: bool = False,
    allow_empty: bool = False,
) -> Iterator[Any]:
    """The batches' input tensors, (n, ...) each, one after the other: never changed and not copied.

    calibration: a tensor or array (N, ...), split into `batch_size`; an iterable, sized or not, of batches that
        `input_of` understands; or a function of no arguments that returns one of these.
    max_samples, max_batches: limits, both always honoured. The last tensor is cut so that exactly `max_samples` images
        are used, and nothing is read beyond the batch that reaches a limit.
    raw: yield the batches as they came, for a user's own `forward_fn`. They are whole: reading stops with the batch
        that reaches `max_samples`, counted along the first tensor found in each.
    allow_empty: have no batches at all without an error, as one of several ranks may.
    Raises CalibrationError: a limit below 1 (at once); no batches, a batch of an unknown kind or without images.
    """
    for option, limit in (("max_samples", max_samples), ("max_batches", max_batches), ("batch_size", batch_size)):
        check_count(option, limit)
    source = calibration() if callable(calibration) and not isinstance(calibration, Iterable) else calibration
    return _read(source, _iterate(source, batch_size, max_samples), max_samples, max_batches, raw, allow_empty)


def hold(calibration: Calibration, batches: Iterable[Any]) -> list[Any]:
    """The batches that were read from `calibration`, to be gone through any number of times."""
    # a loader may hand out the same memory again and again
    return list(batches if is_held(calibration) else map(copy.deepcopy, batches))


def check_count(option: str, limit: int | None) -> None:
    """Raise CalibrationError for a limit that is neither None nor a whole number of at least 1."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise CalibrationError(f"{option} must be a whole number of at least 1, not {limit!r}")


def is_held(calibration: Any) -> bool:
    """Are the batches in the caller's hands, so that keeping them takes no memory?"""
    return isinstance(calibration, Tensor | np.ndarray | list | tuple)


def _read(
    source: Any, batches: Iterator[Any], max_samples: int | None, max_batches: int | None, raw: bool, allow_empty: bool
) -> Iterator[Any]:
    samples, dimensions = 0, set()
    for index, batch in enumerate(batches):
        try:
            images = first_tensor(batch) if raw else input_of(batch)
            count = 0 if images is None else _count(images)
        except CalibrationError as error:
            raise CalibrationError(f"batch {index}: {error}") from None
        dimensions.add(0 if images is None else images.ndim)
        if not raw and len(dimensions) > 1:
            raise CalibrationError(
                f"the batches differ in their number of dimensions ({', '.join(map(str, sorted(dimensions)))}); "
                "an (images, labels) pair is one batch: put it in a list"
            )
        left = count if max_samples is None else max_samples - samples
        yield batch if raw else images if images is None or count <= left else images[:left]
        samples += count
        if index + 1 == max_batches or (max_samples is not None and samples >= max_samples):
            return
    if not dimensions and not allow_empty:
        raise CalibrationError(_nothing_read(source))


def input_of(batch: Any) -> Tensor:
    """The input tensor of one batch: the tensor (or array); the first of a tuple or list; a known key of a dict.

    The keys are `INPUT_KEYS`, tried in that order. Raises CalibrationError, naming the type and keys, for another kind.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, np.ndarray):
        return _as_tensor(batch)
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


def load_images(
    path: str | Path,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    size: int | tuple[int, int] | None = None,
    max_samples: int | None = None,
    seed: int | None = 0,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Images from disk as one float32 tensor (N, C, H, W): shuffled, then at most `max_samples` of them.

    path: an .npz (the array `images`, `x` or `data`, or its only one; or `jpeg`, JPEG files end to end, with the N + 1
        `offsets` where they begin and end), an .npy, or a folder of images, read recursively. Arrays are (N, H, W),
        (N, H, W, C) or (N, C, H, W), C being 1, 3 or 4. Image files become RGB and need the `images` extra.
    mean, std: (x - mean) / std per channel, after uint8 is divided by 255; floats are taken as they are. Give what
        the network was trained with.
    size: image files are resized and cropped about their centre to this height and width; None: they must agree.
    seed: of the shuffle, which comes before the limit because folders and many arrays are sorted by class. None keeps
        the order of the array, or of the sorted file names.
    shard: (k, n) for the k-th of n ranks, from 0: of all those images the k-th and every n-th after it. May be none.
    Raises CalibrationError, naming the file, for what cannot be read. Nothing is ever unpickled.
    """
    path, (rank, ranks) = Path(path), shard
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))
        mine = _order(path, len(files), max_samples, seed)[rank::ranks]
        return _normalise(path, _decode([(files[i], files[i]) for i in mine], size), mean, std)
    arrays = _read_arrays(path, ("images", "x", "data", "jpeg", "offsets"), only_one=True)
    if {"jpeg", "offsets"} <= arrays.keys():
        data, offsets = arrays["jpeg"], arrays["offsets"]
        mine = _order(path, len(offsets) - 1, max_samples, seed)[rank::ranks]
        jpegs = [(f"{path}, image {i}", io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())) for i in mine]
        return _normalise(path, _decode(jpegs, size), mean, std)
    if size is not None:
        raise CalibrationError(f"{path}: size is for image files; arrays are used at the size they have")
    array = next(iter(arrays.values()))
    mine = _order(path, len(array), max_samples, seed)[rank::ranks]
    return _normalise(path, _channels_first(path, array[mine]), mean, std)


def load_labels(path: str | Path, *, max_samples: int | None = None, seed: int | None = 0) -> Tensor:
    """The int64 labels (N,) in `labels` or `y` of an .npz, in the order of `load_images` with the same options."""
    labels = next(iter(_read_arrays(Path(path), ("labels", "y")).values()))
    return torch.from_numpy(labels[_order(Path(path), len(labels), max_samples, seed)].astype(np.int64))


def _iterate(source: Any, batch_size: int, max_samples: int | None) -> Iterator[Any]:
    if isinstance(source, Tensor | np.ndarray):
        if source.ndim == 0:
            raise CalibrationError("the calibration images are a tensor without dimensions; give (N, ...)")
        return iter(_as_tensor(source[:max_samples]).split(batch_size) if len(source) else ())
    if isinstance(source, str | bytes | Path):
        raise CalibrationError(f"calibration is a path, {str(source)!r}; read it with calibration.load_images")
    if isinstance(source, Mapping):
        raise CalibrationError(f"calibration is one batch of kind {_describe(source)}; put it in a list")
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise CalibrationError("calibration is a Dataset of single images; pass DataLoader(dataset, 128, shuffle=True)")
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise CalibrationError(f"calibration must be a tensor or an iterable of batches, not {type(source).__name__}")
    return iter(source)


def first_tensor(batch: Any) -> Tensor | np.ndarray | None:
    """The first tensor with a batch axis in a nest of tuples, lists and dicts."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def _count(tensor: Tensor | np.ndarray) -> int:
    if tensor.ndim == 0:
        raise CalibrationError("its images are a tensor without dimensions; give (n, ...)")
    if len(tensor) == 0:
        raise CalibrationError(f"there are no images in it (shape {tuple(tensor.shape)})")
    return len(tensor)


def _nothing_read(source: Any) -> str:
    if isinstance(source, Iterator):
        return (
            "no batches: the iterator is used up, as a generator is after one pass; pass a list, a DataLoader, or a "
            "function that returns a new iterator"
        )
    return "no batches: the calibration data is empty"


def _describe(batch: Any) -> str:
    name = type(batch).__name__
    return f"{name} with keys {', '.join(map(repr, batch)) or 'none'}" if isinstance(batch, Mapping) else name


def _as_tensor(array: Tensor | np.ndarray) -> Tensor:
    """The tensor, or one over the array's memory; a copy of what torch cannot share (read-only, reversed)."""
    if isinstance(array, Tensor):
        return array
    shareable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    try:
        return torch.from_numpy(array if shareable else array.copy())
    except TypeError as error:
        raise CalibrationError(f"an array of {array.dtype} holds no images: {error}") from None


def _order(path: Path, total: int, limit: int | None, seed: int | None) -> np.ndarray:
    """Which images to take, in order: all of them, or a shuffled choice."""
    if total < 1 or (limit is not None and limit < 1):
        raise CalibrationError(f"{path}: {total} images found, at most {limit} asked for; both must be at least 1")
    return (np.arange(total) if seed is None else np.random.default_rng(seed).permutation(total))[:limit]


def _read_arrays(path: Path, names: Sequence[str], only_one: bool = False) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz (`only_one`: else its only one, whatever its name), or that of an .npy."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {names[0]: np.atleast_1d(loaded)}
        with loaded as archive:
            stored = list(archive.keys())
            found = [name for name in names if name in stored] or (stored if only_one and len(stored) == 1 else [])
            arrays = {name: archive[name] for name in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: not a readable .npz, .npy or folder of images ({error})") from error
    if not arrays:
        raise CalibrationError(f"{path}: none of {', '.join(names)} among its arrays ({', '.join(stored) or 'none'})")
    return arrays


def _channels_first(path: Path, array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        return array[:, None]
    first, last = (array.ndim == 4 and array.shape[axis] in CHANNELS for axis in (1, -1))
    if first == last:
        raise CalibrationError(f"{path}: cannot tell the channels of an array of shape {array.shape}; pass a tensor")
    return array if first else array.transpose(0, 3, 1, 2)


def _decode(sources: Sequence[tuple[object, Any]], size: int | tuple[int, int] | None) -> np.ndarray:
    """RGB images (N, 3, H, W), uint8, of (name, file) pairs."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise CalibrationError("reading image files needs Pillow: pip install 'resuscitate[images]'") from None
    images: list[np.ndarray] = []
    for name, file in sources:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CalibrationError(f"{name}: not a readable image ({error})") from error
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            image = ImageOps.fit(image, (width, height))
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise CalibrationError(
                f"{name}: {image.height}x{image.width} pixels, but {sources[0][0]} has {images[0].shape[0]}x"
                f"{images[0].shape[1]}; pass size= to bring all images to one size"
            )
    return np.stack(images).transpose(0, 3, 1, 2) if images else np.empty((0, 3, 1, 1), dtype=np.uint8)


def _normalise(
    path: Path, images: np.ndarray, mean: Sequence[float] | float | None, std: Sequence[float] | float | None
) -> Tensor:
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise CalibrationError(f"{path}: images must be uint8 or floating point, not {images.dtype}")
    scaled = torch.from_numpy(np.ascontiguousarray(images)).float()
    if images.dtype == np.uint8:
        scaled /= 255
    shift, scale = (torch.tensor(d if v is None else v).float().view(-1, 1, 1) for v, d in ((mean, 0), (std, 1)))
    channels = scaled.shape[1]
    if len(shift) not in (1, channels) or len(scale) not in (1, channels) or not bool((scale > 0).all()):
        raise CalibrationError(
            f"{path}: mean={mean} and std={std} must be one number, or one for each of {channels} channels, std above 0"
        )
    return scaled.sub_(shift).div_(scale)
