"""The trained networks and the images that the benchmarks read."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

import resuscitate
from benchmarks.common.results import ROOT
from benchmarks.networks import NETS
from benchmarks.networks.checkpoints import is_trained, load
from benchmarks.networks.dscnn import load_dscnn
from resuscitate.data.images import load_images, load_labels
from resuscitate.models import build

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMPACT = ROOT / "build" / "compact"  # the networks that `make compact` has trained

# options of several command lines
DataFolder = Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")]
Nets = Annotated[str, typer.Option(help="which networks, by comma")]
ImageCount = Annotated[int, typer.Option(help="for calibration")]


def data_folder(given: Path | None) -> Path:
    """The folder with the trained networks and the images; exits with a message if the files are missing."""
    folder = given or Path(os.environ.get("RESUSCITATE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10_resnet20.safetensors").exists():
        sys.exit(
            f"no data in {folder}: this benchmark needs cifar10_resnet20.safetensors, cifar10_resnet32.safetensors,\n"
            "cifar10_jpeg_train.npz and cifar10_jpeg_test.npz; name their folder with --data or RESUSCITATE_DATA"
        )
    return folder


def calibration_images(folder: Path, count: int) -> Tensor:
    """CIFAR-10 training images (count, 3, 32, 32), normalised as in the training of the networks."""
    return load_images(folder / "cifar10_jpeg_train.npz", mean=MEAN, std=STD, max_samples=count)


def scorer(folder: Path, count: int) -> resuscitate.Accuracy:
    """Top-1 accuracy on the first `count` CIFAR-10 test images, none of which is used for calibration."""
    test, options = folder / "cifar10_jpeg_test.npz", {"max_samples": count, "seed": None}
    return resuscitate.Accuracy(load_images(test, mean=MEAN, std=STD, **options), load_labels(test, **options))


def network(name: str, folder: Path, images: Tensor) -> nn.Module:
    """The trained network; without trained weights, random weights and BatchNorm statistics of 512 of the images.

    Exits with a message if it is one of `benchmarks.networks` that is not trained.
    """
    if name in NETS:
        if not is_trained(name, COMPACT):
            sys.exit(f"{name} is not trained: `make compact` trains it")
        return load(name, COMPACT)[0]
    torch.manual_seed(0)
    model = build(name).eval()
    weights = folder / f"cifar10_{name}.safetensors"
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        resuscitate.recalibrate_batchnorm(model, images[:512])
    return model


def case(net: str, draw: int, folder: Path, test_images: int) -> tuple[nn.Module, Tensor, resuscitate.Accuracy]:
    """A dense network, the calibration images of this draw, and a score in per cent on others.

    "dscnn": 300 of the clips, the other 200 to test on. Else 512 of 5,120 training images of CIFAR-10.
    """
    generator = torch.Generator().manual_seed(draw)
    if net == "dscnn":
        dense, clips, labels = load_dscnn(folder)
        order = torch.randperm(len(clips), generator=generator)
        return dense, clips[order[:300]], resuscitate.Accuracy(clips[order[300:]], labels[order[300:]])
    pool = calibration_images(folder, 5120)
    images = pool[torch.randperm(len(pool), generator=generator)[:512]]
    return network(net, folder, pool), images, scorer(folder, test_images)


def pruned_copy(dense: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """A copy of the network, pruned by global magnitude."""
    model = copy.deepcopy(dense)
    resuscitate.sparsify(model, sparsity)
    return model
