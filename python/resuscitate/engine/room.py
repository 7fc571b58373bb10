"""Memory limits on the images of a loader: the images themselves and the activations that a walk stores per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..data.calibration import Room
from ..network.runner import Network
from ..network.wiring import trace
from ..runtime.activations import Store, parse_memory
from ..utils.nested import bytes_of, count_images
from .pass_memory import TrialPass, model_identities
from .segments import follow


def in_stores(images: Store, activations: Store, nets: Sequence[Network]) -> Room:
    """Limits for the images in one store and the activations of a walk over `nets` in another (or the same) store."""
    per_image: list[float] = []

    def waiting(batch: Any) -> int:
        if not per_image:
            example = nets[0].example(batch)
            per_image.append(sum(_most_waiting(net, example) for net in nets) / count_images(example))
        return int(per_image[0] * count_images(batch))

    limits: list[tuple[int, Callable[[Any], int]]] = [(images.room(), bytes_of), (activations.room(), waiting)]
    if images is activations:
        limits = [(images.room(), lambda batch: bytes_of(batch) + waiting(batch))]
    return Room(limits, "the memory budget and half of the free scratch space", "memory= and scratch= give more, ")


def in_memory(memory: int | str | None, device: torch.device | str | None, model: nn.Module, holders: int = 1) -> Room:
    """A limit for images that each of `holders` processes holds in host memory.

    The processes share `memory` if the model runs on the CPU, else half of the free host memory. Raises ValueError as
    `parse_memory` does.
    """
    on_host = (Network(model).device if device is None else torch.device(device)).type == "cpu"
    size = parse_memory(memory if on_host else None, torch.device("cpu")) // holders
    lacking, remedy = ("the memory budget", "memory= gives more, ") if on_host else ("half of the free host memory", "")
    return Room([(size, bytes_of)], lacking, remedy)


def _most_waiting(net: Network, batch: Any) -> int:
    """The most bytes of activations that a walk keeps of a batch; 0 where the model raises an error."""
    with suppress(Exception):  # the walk will raise it
        if net.forward_fn is None:
            with suppress(Exception):
                return follow(net, trace(net.model), batch)[1]
        with TrialPass(model_identities(net.model)) as trial:
            net.run(batch)
        return trial.peak
    return 0
