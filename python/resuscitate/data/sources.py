"""Where images lie: arrays, JPEG files end to end, folders, parquet tables, tar shards. Nothing is unpickled."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CalibrationError
from ..runtime.activations import free_memory

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = ("folder", "npz", "npy", "parquet", "wds")
CHANNELS = (1, 3, 4)
LABELS = ("labels", "y")  # names of arrays in an .npz
IMAGES = ("images", "x", "data")

Size = int | tuple[int, int] | None
Labels = np.ndarray | None  # int (N,)


def open_source(path: str | Path, size: Size = None) -> _Array | _Files:
    """The images at `path`, whose kind a word before a colon says, or its ending, or the files of a folder.

    size: image files are resized and cropped about their centre to this height and width; None: they must agree.
    Of the result `read(rows)` gives the images of these numbers, (n, C, H, W), uint8 or floating point, and `labels`
    those of all, int (N,), or None. `open_source` and `read` raise CalibrationError, naming a file that cannot be read.
    """
    path, kind = _kind(path)
    if kind in READERS:
        return READERS[kind](path, size)
    arrays = _read_arrays(path)
    labels = next((arrays[name] for name in LABELS if name in arrays), None)
    if {"jpeg", "offsets"} <= arrays.keys():
        return _Jpegs(path, arrays["jpeg"], arrays["offsets"], labels, size)
    unknown = [name for name in arrays if name not in LABELS]
    named = [name for name in IMAGES if name in arrays] or (unknown if len(unknown) == 1 else [])
    if not named:
        stored = ", ".join(arrays) or "none"
        raise CalibrationError(f"{path}: none of images, x, data, jpeg and offsets among its arrays ({stored})")
    if size is not None:
        raise CalibrationError(f"{path}: size is for image files; arrays are used at the size they have")
    return _Array(path, arrays[named[0]], labels)


def _kind(path: str | Path) -> tuple[Path, str]:
    word, _, rest = str(path).partition(":")
    path, kind = (Path(rest), word) if rest and word in KINDS else (Path(path), "")
    if not kind and path.is_dir():
        inside = {file.suffix for file in path.iterdir()}
        kind = "parquet" if ".parquet" in inside else "wds" if ".tar" in inside else "folder"
    return path, kind or {".parquet": "parquet", ".tar": "wds"}.get(path.suffix, "npz")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or that of an .npy, which stays on the disk, as `images`."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": np.atleast_1d(loaded)}
        with loaded as archive:
            wanted = [n for n in archive if n in (*IMAGES, *LABELS, "jpeg", "offsets")] or list(archive)
            size = sum(entry.file_size for entry in archive.zip.infolist() if entry.filename[:-4] in wanted)
            if size > free_memory(torch.device("cpu")):
                raise CalibrationError(f"{path}: unpacks to {size:,} bytes, more than there is memory")
            return {name: np.atleast_1d(archive[name]) for name in wanted}
    except CalibrationError:
        raise
    except Exception as error:  # a broken header may raise anything
        if path.exists() and path.suffix not in (".npz", ".npy"):
            known = ".npz, .npy, .parquet, .tar or a folder"
            raise CalibrationError(f"{path}: holds no images; they are read from {known}") from error
        raise CalibrationError(f"{path}: not a readable .npz, .npy or folder of images ({error})") from error


class _Array:
    """An array (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1, 3 or 4."""

    def __init__(self, path: Path, array: np.ndarray, labels: Labels) -> None:
        if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
            raise CalibrationError(f"{path}: images must be uint8 or floating point, not {array.dtype}")
        first, last = (array.ndim == 4 and array.shape[axis] in CHANNELS for axis in (1, -1))
        if array.ndim != 3 and first == last:
            problem = f"cannot tell the channels of an array of shape {array.shape}; pass a tensor"
            raise CalibrationError(f"{path}: {problem}")
        self.array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2) if last else array
        self.labels = labels

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.array[rows]


class _Files:
    """Encoded image files. A subclass says what its `items` are, and opens one."""

    def __init__(self, path: Path, size: Size, items: Sequence[Any], labels: Labels = None) -> None:
        self.path, self.size, self.items, self.labels = path, size, items, labels

    def __len__(self) -> int:
        return len(self.items)

    def open(self, row: int) -> tuple[str, Any]:
        """The name of an image for messages, and its path or an open file."""
        raise NotImplementedError

    def read(self, rows: np.ndarray) -> np.ndarray:
        """RGB images (n, 3, H, W), uint8."""
        files = [self.open(row) for row in rows.tolist()]
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise CalibrationError("reading image files needs Pillow: pip install 'resuscitate[images]'") from None
        images: list[np.ndarray] = []
        for name, file in files:
            try:
                with Image.open(file) as opened:
                    image, mode = opened.convert("RGB"), opened.mode
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise CalibrationError(f"{name}: not a readable image ({error})") from error
            if mode[0] in "IF":  # of 16 or 32 bits, which `convert` cuts off at 255
                remedy = "convert it to 8 bits, or give an array of floats"
                raise CalibrationError(f"{name}: its pixels have more than 8 bits (mode {mode}); {remedy}")
            if self.size is not None:
                height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
                image = ImageOps.fit(image, (width, height))
            images.append(np.asarray(image))
            if images[-1].shape != images[0].shape:
                height, width = images[0].shape[:2]
                raise CalibrationError(
                    f"{name}: {image.height}x{image.width} pixels, but {files[0][0]} has {height}x{width}; "
                    "pass size= to bring all images to one size"
                )
        return np.stack(images).transpose(0, 3, 1, 2) if images else np.empty((0, 3, 1, 1), dtype=np.uint8)


class _Folder(_Files):
    """A folder of image files, read recursively, in the order of their names."""

    def __init__(self, path: Path, size: Size) -> None:
        found = (f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        super().__init__(path, size, sorted(found))
        if not self.items:
            raise CalibrationError(f"{path}: no image files ({', '.join(SUFFIXES)}) in this folder or below it")

    def open(self, row: int) -> tuple[str, Any]:
        return str(self.items[row]), self.items[row]


class _Jpegs(_Files):
    """JPEG files end to end in one array of bytes; file i lies from offset i to offset i + 1."""

    def __init__(self, path: Path, data: np.ndarray, offsets: np.ndarray, labels: Labels, size: Size) -> None:
        if data.dtype != np.uint8 or data.ndim != 1 or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
            raise CalibrationError(f"{path}: jpeg must be bytes, uint8 (B,), and offsets whole numbers (N + 1,)")
        super().__init__(path, size, np.stack([offsets[:-1], offsets[1:]], 1), labels)  # type: ignore[arg-type]
        self.data = data

    def open(self, row: int) -> tuple[str, Any]:
        return f"{self.path}, image {row}", io.BytesIO(self.data[slice(*self.items[row])].tobytes())


class _Parquet(_Files):
    """Tables as Hugging Face datasets write them: a column of images, bytes or a struct with `bytes`; kept encoded."""

    def __init__(self, path: Path, size: Size) -> None:
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
        super().__init__(path, size, table[named[0]], table[labelled].to_numpy() if labelled else None)

    def open(self, row: int) -> tuple[str, Any]:
        name, value = f"{self.path}, row {row}", self.items[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise CalibrationError(f"{name}: holds no bytes of an image")
        return name, io.BytesIO(content)


class _Shards(_Files):
    """Tar shards as webdataset has them, one file or a folder of them: images, and the .cls of each with its label."""

    def __init__(self, path: Path, size: Size) -> None:
        images, classes = list[tuple[str, Path, int, int]](), dict[str, int]()
        try:
            for shard in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        stem, _, ending = member.name.rpartition(".")
                        name = f"{shard}/{stem}"
                        if member.isfile() and f".{ending.lower()}" in SUFFIXES:
                            images.append((name, shard, member.offset_data, member.size))
                        elif member.isfile() and ending == "cls" and (text := archive.extractfile(member)):
                            classes[name] = int(text.read(32))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise CalibrationError(f"{path}: not readable tar shards ({error})") from error
        labels = [classes[name] for name, *_ in images if name in classes]
        super().__init__(path, size, images, np.array(labels) if images and len(labels) == len(images) else None)

    def open(self, row: int) -> tuple[str, Any]:
        name, shard, offset, size = self.items[row]
        with open(shard, "rb") as file:
            file.seek(offset)
            return name, io.BytesIO(file.read(size))


READERS: dict[str, Callable[[Path, Any], _Files]] = {"folder": _Folder, "parquet": _Parquet, "wds": _Shards}
