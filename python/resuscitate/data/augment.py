"""Augmented calibration images: more images for a fit from the same ones, without labels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CalibrationError
from ..utils.nested import count_images

Named = Literal["flip", "crop"]
Augment = Named | Sequence[Named] | Callable[[Any], Any]
MARGIN = 8  # a crop moves an image by up to this part of its size
_one_at_a_time = threading.Lock()


def check_augment(augment: Augment | None, draws: int, raw: bool) -> None:
    """Raise ValueError for an unknown augmentation, or a number of draws below 1.

    raw: the batches are for a `forward_fn`, which a function alone can change.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws={draws!r} must be a whole number of at least 1")
    if augment is None or callable(augment):
        return
    names = _names(augment)
    if not names or any(name not in get_args(Named) for name in names):
        raise ValueError(f"augment={augment!r} is unknown; there are 'flip', 'crop', both in a list, or a function")
    if raw:
        raise ValueError(
            f"augment={augment!r} changes tensors of images; with a forward_fn, give a function of a batch"
        )


def augmented(batch: Any, augment: Augment, draw: int, keys: Tensor) -> Any:
    """The batch changed for the draw of this number, from 0 on; keys (N,), int64, from the contents of its images.

    "flip" mirrors the images from left to right in every other draw, from the first on. "crop" moves each image by up
    to an eighth of its size along both axes, and fills with 0; how far depends on its key and the draw, not on the
    other images. A function gets the batch, and may use PyTorch's random numbers: their seed depends on all its images.
    """
    if callable(augment):
        with _one_at_a_time, torch.random.fork_rng(devices=[]):  # passes of several threads read images
            torch.default_generator.manual_seed(int(keys.sum()) + draw)  # and no GPU's
            found = augment(batch)
        if count_images(found) != count_images(batch):
            counts = f"{count_images(found)} images from a batch of {count_images(batch)}"
            raise CalibrationError(f"augment returned {counts}; it must return as many as it gets")
        return found
    names = _names(augment)
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise CalibrationError(f"augment={augment!r} is for images (N, C, H, W), not {shape}; give a function")
    if "flip" in names and draw % 2 == 0:
        batch = batch.flip(3)
    return _moved(batch, [key + draw for key in keys.tolist()]) if "crop" in names else batch


def _names(augment: Named | Sequence[Named]) -> list[str]:
    return [augment] if isinstance(augment, str) else list(augment)


def _moved(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Each image (N, C, H, W) moved by up to an eighth of its size, filled with 0; seeds: one for each image."""
    height, width = images.shape[2:]
    down, right = max(height // MARGIN, 1), max(width // MARGIN, 1)
    padded, generator = F.pad(images, (right, right, down, down)), torch.Generator()
    moved = torch.empty_like(images)
    for each, found, seed in zip(padded, moved, seeds, strict=True):
        generator.manual_seed(seed)
        top, left = (int(torch.randint(2 * most + 1, (), generator=generator)) for most in (down, right))
        found.copy_(each[:, top : top + height, left : left + width])
    return moved
