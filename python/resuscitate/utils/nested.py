"""Tensors in a nest of tuples, lists and dicts: the first one, their total bytes, and the number of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor


def first_tensor(batch: Any) -> Tensor | np.ndarray | None:
    """The first tensor or array that has a batch axis; None if there is none."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch if batch.ndim else None
    return next((found for part in _parts(batch) if (found := first_tensor(part)) is not None), None)


def count_images(batch: Any) -> int:
    """The number of images in a batch: the length of its first tensor, 1 if it has none."""
    tensor = first_tensor(batch)
    return 1 if tensor is None else len(tensor)


def bytes_of(batch: Any) -> int:
    """The total bytes of all tensors and arrays."""
    return batch.nbytes if isinstance(batch, Tensor | np.ndarray) else sum(map(bytes_of, _parts(batch)))


def _parts(batch: Any) -> Iterable[Any]:
    """The values of a dict, the elements of a tuple or list; nothing of any other type."""
    return batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
