"""Images on disk, and their labels: arrays, folders of files, parquet tables, tar shards. Nothing is unpickled."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CalibrationError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = ("folder", "npz", "npy", "parquet", "wds")
CHANNELS = (1, 3, 4)


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
    (path, kind), (rank, ranks) = _source(path), shard
    if kind not in ("npz", "npy"):
        files = READERS[kind](path)
        mine = _order(path, len(files.names), max_samples, seed)[rank::ranks]
        return _normalise(path, _decode([(files.names[i], files.open(i)) for i in mine], size), mean, std)
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
    """The int64 labels (N,), in the order of `load_images` with the same options.

    Of an .npz the array `labels` or `y`; of parquet the column `label`, `labels` or `fine_label`; of tar shards the
    .cls beside each image. Raises CalibrationError where there are none.
    """
    path, kind = _source(path)
    if kind == "npz":
        labels = next(iter(_read_arrays(path, ("labels", "y")).values()))
    else:
        found = READERS[kind](path).labels if kind in READERS else None
        if found is None:
            raise CalibrationError(f"{path}: holds no labels; an .npz has them as `labels`")
        labels = found
    return torch.from_numpy(labels[_order(path, len(labels), max_samples, seed)].astype(np.int64))


@dataclass
class _Files:
    """Image files, wherever they lie: their names, how to open the i-th, and their labels if there are any."""

    names: Sequence[object]
    open: Callable[[int], Any]
    labels: np.ndarray | None = None


def _source(path: str | Path) -> tuple[Path, str]:
    """Where it lies, and its kind: by the word before a colon, or by its ending, or by what a folder holds."""
    word, _, rest = str(path).partition(":")
    path, kind = (Path(rest), word) if rest and word in KINDS else (Path(path), "")
    if not kind and path.is_dir():
        inside = {file.suffix for file in path.iterdir()}
        kind = "parquet" if ".parquet" in inside else "wds" if ".tar" in inside else "folder"
    return path, kind or {".parquet": "parquet", ".tar": "wds", ".npy": "npy"}.get(path.suffix, "npz")


def _folder(path: Path) -> _Files:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    return _Files(files, lambda index: files[index])


def _parquet(path: Path) -> _Files:
    """Tables as Hugging Face datasets write them: a column of images, bytes or a struct with `bytes`."""
    try:
        from pyarrow import ArrowException, types  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetDataset  # type: ignore[import-untyped]
    except ImportError:
        raise CalibrationError("reading parquet needs pyarrow: pip install 'resuscitate[parquet]'") from None
    try:
        data = ParquetDataset(path)
        fields = {field.name: field.type for field in data.schema}
        encoded = [name for name, kind in fields.items() if types.is_struct(kind) or types.is_binary(kind)]
        named = [name for name in encoded if name in ("image", "img", "images", "jpg", "png")] or encoded
        if not named:
            raise CalibrationError(f"{path}: no column of encoded images among {', '.join(fields)}")
        labelled = next((name for name in ("label", "labels", "fine_label") if name in fields), None)
        table = data.read(columns=[named[0], *([labelled] if labelled else [])])
    except (OSError, ArrowException) as error:
        raise CalibrationError(f"{path}: not readable parquet ({error})") from error

    def open_row(index: int) -> io.BytesIO:
        value = table[named[0]][index].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise CalibrationError(f"{path}, row {index}: holds no bytes of an image")
        return io.BytesIO(content)

    names = [f"{path}, row {index}" for index in range(len(table))]
    return _Files(names, open_row, table[labelled].to_numpy() if labelled else None)


def _shards(path: Path) -> _Files:
    """Tar shards as webdataset has them, one file or a folder of them: images, and the .cls of each with its label."""
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    images, classes = list[tuple[str, Path, int, int]](), dict[str, int]()
    try:
        for shard in shards:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    stem, _, ending = member.name.rpartition(".")
                    name = f"{shard}/{stem}"
                    if member.isfile() and f".{ending.lower()}" in SUFFIXES:
                        images.append((name, shard, member.offset_data, member.size))
                    elif member.isfile() and ending == "cls" and (text := archive.extractfile(member)):
                        classes[name] = int(text.read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise CalibrationError(f"{path}: not readable tar shards ({error})") from error

    def open_member(index: int) -> io.BytesIO:
        _, shard, offset, size = images[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    names = [name for name, *_ in images]
    labels = np.array([classes[name] for name in names]) if names and all(name in classes for name in names) else None
    return _Files(names, open_member, labels)


READERS: dict[str, Callable[[Path], _Files]] = {"folder": _folder, "parquet": _parquet, "wds": _shards}


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
