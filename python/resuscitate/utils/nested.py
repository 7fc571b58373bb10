"""Tensors and arrays in a nest of tuples, lists and dicts: the images and their number, their total bytes, copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import CalibrationError

IMAGE_CHANNELS = (1, 3, 4)


def images_of(batch: Any) -> Tensor | np.ndarray | Sequence[Tensor | np.ndarray] | None:
    """The images of a batch: the first tensor that has a batch axis, or the first list of images; None if none.

    A list of images is a list or tuple of nothing but tensors (C, H, W) with the same number of channels: 1, 3 or 4, as
    images have. Others, such as the tensors (N, C, L) of signals and their targets, are no list of images.
    """
    if isinstance(batch, Tensor | np.ndarray):
        return batch if batch.ndim else None
    if _are_images(batch):
        return batch
    return next((found for part in _parts(batch) if (found := images_of(part)) is not None), None)


def count_images(batch: Any) -> int:
    """The number of images in a batch, as `images_of` finds them: 1 if it finds none."""
    images = images_of(batch)
    return 1 if images is None else len(images)


def as_tensor(array: Tensor | np.ndarray) -> Tensor:
    """The tensor, or one over the array's memory; a copy of what torch cannot share (read-only, reversed)."""
    if isinstance(array, Tensor):
        if array.layout is not torch.strided:
            raise CalibrationError(f"a tensor of layout {array.layout} holds no images; make it dense: .to_dense()")
        return array
    shareable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    try:
        return torch.from_numpy(array if shareable else array.copy())
    except TypeError as error:
        raise CalibrationError(f"an array of {array.dtype} holds no images: {error}") from None


def copied(batch: Any) -> Any:
    """A deep copy; a tensor that is a part of another one is copied alone, without its graph."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), batch)


def bytes_of(batch: Any) -> int:
    """The total bytes of all tensors and arrays."""
    return batch.nbytes if isinstance(batch, Tensor | np.ndarray) else sum(map(bytes_of, _parts(batch)))


def _parts(batch: Any) -> Iterable[Any]:
    """The values of a dict, the elements of a tuple or list; nothing of any other type."""
    return batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()


def _are_images(batch: Any) -> TypeGuard[Sequence[Tensor | np.ndarray]]:
    if not isinstance(batch, tuple | list) or not batch:
        return False
    if not all(isinstance(each, Tensor | np.ndarray) and each.ndim == 3 for each in batch):
        return False
    return len(batch[0]) in IMAGE_CHANNELS and len({len(each) for each in batch}) == 1
