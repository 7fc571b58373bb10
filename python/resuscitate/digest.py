"""Short names for contents: is this the model, and are these the images, that a file or another rank speaks of?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calibration import first_tensor
from .scratch import view_bytes

MODULUS = 1 << 56  # sums over a hundred ranks stay within int64


def digest_model(model: nn.Module) -> str:
    """Of every parameter and buffer, with its name, dtype and shape, wherever the model lies."""
    return digest_tensors(model.state_dict())


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors with their names, dtypes and shapes, wherever they lie."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()[:32]


def digest_images(batches: Iterable[Any]) -> int:
    """Of a set of images: a sum over them, so that neither their order nor their split into batches matters.

    A batch that is no tensor counts as one image.
    """
    total = 0
    for batch in batches:
        if isinstance(batch, Tensor):
            parts = [[image] for image in batch]
        else:
            parts = [[leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]]
        for tensors in parts:
            found = hashlib.blake2b(digest_size=8)
            for tensor in tensors:
                found.update(_bytes(tensor))
            total += int.from_bytes(found.digest(), "big")
    return total % MODULUS


def image_keys(batch: Any) -> list[int]:
    """Of each image of a batch, by its contents: a whole number of 63 bits. Along the first tensor found in it."""
    images = first_tensor(batch)
    rows: Any = [] if images is None else images if isinstance(images, Tensor) else torch.from_numpy(images)
    return [int.from_bytes(hashlib.blake2b(_bytes(row), digest_size=8).digest(), "big") >> 1 for row in rows] or [0]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return view_bytes(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")
