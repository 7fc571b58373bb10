"""The networks and the images of a benchmark, and what is decided about them."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from common import MEAN, STD, network
from torch import Tensor, nn

import resuscitate
from resuscitate.data.images import load_images, load_labels

from .checkpoints import load


@dataclass(frozen=True)
class Settings:
    """What else decides the figures; rows with other settings are not mixed."""

    ema_batches: tuple[int, ...]
    batch_size: int
    gain_samples: int
    images: int
    test_images: int
    train: str
    test: str

    @property
    def most(self) -> int:
        """Images behind the longest momentum re-estimate, and behind the exact one."""
        return max(self.ema_batches) * self.batch_size


@dataclass(frozen=True)
class Study:
    """Networks and images, each read once and put on the device."""

    settings: Settings
    train: Path
    test: Path
    folder: Path | None
    checkpoints: Path | None
    device: torch.device
    channels_last: bool

    def place(self, tensors: Any) -> Any:
        """Images, or a network, on the device and in the memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return tensors.to(self.device, memory_format=layout)

    @cache  # noqa: B019
    def dense(self, net: str) -> nn.Module:
        """A trained network of the zoo, or one that common.py knows."""
        if self.checkpoints is not None and (self.checkpoints / f"{net}.safetensors").exists():
            model = load(net, self.checkpoints)[0]
        elif self.folder is not None and (self.folder / f"cifar10_{net}.safetensors").exists():
            model = network(net, self.folder, torch.empty(0))
        else:
            sys.exit(f"no trained {net}: python benchmarks/zoo/train.py --nets {net} --output FOLDER makes one")
        return self.place(model)

    @lru_cache(2)  # noqa: B019
    def calibration(self, count: int, seed: int) -> Tensor:
        """Images to learn from, without their labels; the seed picks them, and a smaller count takes the first."""
        return self.place(load_images(self.train, mean=MEAN, std=STD, max_samples=count, seed=seed))

    @cache  # noqa: B019
    def score(self) -> resuscitate.Accuracy:
        """On images that no calibration sees."""
        options: dict[str, Any] = {"max_samples": self.settings.test_images, "seed": None}
        images = self.place(load_images(self.test, mean=MEAN, std=STD, **options))
        return resuscitate.Accuracy(images, load_labels(self.test, **options).to(self.device))

    @cache  # noqa: B019
    def dense_accuracy(self, net: str) -> float:
        """Before pruning."""
        return self.score()(self.dense(net))


def pruned(dense: nn.Module, sparsity: str) -> nn.Module:
    """A copy with its smallest weights at zero, by a share of all or by a pattern."""
    model = copy.deepcopy(dense)
    if ":" in sparsity:
        resuscitate.sparsify(model, pattern=sparsity)
    else:
        resuscitate.sparsify(model, float(sparsity))
    return model
