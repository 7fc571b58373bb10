"""The networks, the images and the settings of the published comparison."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resuscitate
from benchmarks.common.inputs import MEAN, STD, network
from benchmarks.networks.checkpoints import load
from resuscitate.data.images import load_images, load_labels


@dataclass(frozen=True)
class Settings:
    """All settings on which the figures depend; rows of different settings are not mixed."""

    ema_batches: tuple[int, ...]
    batch_size: int
    gain_samples: int
    images: int
    test_images: int
    train: str
    test: str

    @property
    def most(self) -> int:
        """Number of images of the longest momentum re-estimate; the exact re-estimate uses as many."""
        return max(self.ema_batches) * self.batch_size


@dataclass(frozen=True)
class Study:
    """Networks and images; each is read once and moved to the device."""

    settings: Settings
    train: Path
    test: Path
    folder: Path | None
    checkpoints: Path | None
    device: torch.device
    channels_last: bool

    def place(self, tensors: Any) -> Any:
        """Move images or a network to the device and the memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return tensors.to(self.device, memory_format=layout)

    @cache  # noqa: B019
    def dense(self, net: str) -> nn.Module:
        """A network from the folder of checkpoints, or else from the folder of the images; exits if there is none."""
        if self.checkpoints is not None and (self.checkpoints / f"{net}.safetensors").exists():
            model = load(net, self.checkpoints)[0]
        elif self.folder is not None and (self.folder / f"cifar10_{net}.safetensors").exists():
            model = network(net, self.folder, torch.empty(0))
        else:
            sys.exit(f"no trained {net}: python benchmarks/published/train.py --nets {net} --output FOLDER makes one")
        return self.place(model)

    @lru_cache(2)  # noqa: B019
    def calibration(self, count: int, seed: int) -> Tensor:
        """Calibration images, drawn by the seed from the training images."""
        return self.place(load_images(self.train, mean=MEAN, std=STD, max_samples=count, seed=seed))

    @cache  # noqa: B019
    def score(self) -> resuscitate.Accuracy:
        """Accuracy on the test images, which are not used for calibration."""
        options: dict[str, Any] = {"max_samples": self.settings.test_images, "seed": None}
        images = self.place(load_images(self.test, mean=MEAN, std=STD, **options))
        return resuscitate.Accuracy(images, load_labels(self.test, **options).to(self.device))

    @cache  # noqa: B019
    def dense_accuracy(self, net: str) -> float:
        """Accuracy before pruning."""
        return self.score()(self.dense(net))


def pruned(dense: nn.Module, sparsity: str) -> nn.Module:
    """A copy, pruned by global magnitude to a sparsity ("0.9") or to a pattern ("2:4")."""
    model = copy.deepcopy(dense)
    if ":" in sparsity:
        resuscitate.sparsify(model, pattern=sparsity)
    else:
        resuscitate.sparsify(model, float(sparsity))
    return model
