"""What the commands are given: a model by its name, images by their path; and whether the one runs on the other."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import CalibrationError, ResuscitateError

if TYPE_CHECKING:
    from torch import Tensor, nn


def build_model(name: str) -> nn.Module:
    """A new model in eval mode: by its name in `models.py`, from a library of models, or from the user's own module.

    "timm:NAME", "torchvision:NAME", and "hf:FOLDER", where a Hugging Face configuration for image classification lies;
    else `package.module:factory`, which returns it. Without trained weights, for those are loaded afterwards, and
    without network. Raises typer.BadParameter for an unknown name, ResuscitateError where the model cannot be built.
    """
    from torch import nn

    from ..models import build

    source, _, wanted = name.partition(":")
    if not wanted:
        try:
            return build(name).eval()
        except ValueError as error:
            others = ", timm:NAME, torchvision:NAME, hf:FOLDER" + ", or package.module:factory"
            raise typer.BadParameter(f"{error}{others}") from None
    try:
        network = LIBRARIES[source](wanted) if source in LIBRARIES else _from_module(source, wanted)
    except ModuleNotFoundError as error:
        needs = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
        remedy = f"; pip install {needs[source]}" if error.name == needs.get(source) else ""
        raise ResuscitateError(f"--model {name} cannot be built: {error}{remedy}") from error
    except Exception as error:  # the user's own code, or a library's, may raise anything
        raise ResuscitateError(f"--model {name} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ResuscitateError(f"--model {name} gave a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()


def _from_module(module: str, factory: str) -> Any:
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), factory)()


def _from_timm(name: str) -> Any:
    return importlib.import_module("timm").create_model(name, pretrained=False)


def _from_torchvision(name: str) -> Any:
    return importlib.import_module("torchvision.models").get_model(name, weights=None)


def _from_transformers(folder: str) -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModelForImageClassification.from_config(config)


LIBRARIES = {"timm": _from_timm, "torchvision": _from_torchvision, "hf": _from_transformers}


def read_images(
    path: Path, mean: Any, std: Any, size: Any, limit: int | None, seed: int, shard: tuple[int, int]
) -> tuple[Tensor, dict[str, Any]]:
    """This rank's images, and what they are like, for a wrong normalisation is easier to see than to find.

    path: what `load_images` reads, or `package.module:loader`, a function that returns batches; those are taken in
        their order and as they are, image i by rank i modulo the ranks.
    """
    import asr_kernels as ak

    from ..images import KINDS, load_images

    module, _, loader = str(path).partition(":")
    if loader and module not in KINDS and not path.exists():
        if any(option is not None for option in (mean, std, size)):
            raise typer.BadParameter(f"{path} gives images as they are: leave --mean, --std and --size out")
        images = _load(module, loader, limit)[shard[0] :: shard[1]]
    else:
        images = load_images(path, mean=mean, std=std, size=size, max_samples=limit, seed=seed, shard=shard)
    moments = ak.channel_moments(images) if len(images) else ak.ChannelMoments.empty(images.shape[1])
    measured = {"mean": moments.mean.tolist(), "std": moments.var.sqrt().tolist()}
    described = {"path": str(path), "images": len(images), "shape": list(images.shape[1:])}
    return images, described | {"normalised_with": {"mean": mean, "std": std}, "per_channel": measured}


def _load(module: str, loader: str, limit: int | None) -> Tensor:
    """All images, at most `limit`, of what a function of the user's own returns."""
    import torch

    from ..calibration import read_batches

    try:
        batches = _from_module(module, loader)
    except Exception as error:  # the user's own code, which may raise anything
        raise CalibrationError(f"{module}:{loader} gives no images: {type(error).__name__}: {error}") from error
    return torch.cat(list(read_batches(batches, max_samples=limit)))


def read_labelled(path: Path, mean: Any, std: Any, size: Any, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels from one .npz. Raises ResuscitateError where they are not as many."""
    from ..images import load_images, load_labels

    images = load_images(path, mean=mean, std=std, size=size, max_samples=limit, seed=seed)
    labels = load_labels(path, max_samples=limit, seed=seed)
    if len(labels) != len(images):
        raise ResuscitateError(f"{path}: {len(images)} images and {len(labels)} labels")
    return images, labels


def describe_images(measured: dict[str, Any]) -> str:
    shape = "x".join(map(str, measured["shape"]))
    used, found = (
        ", ".join(f"{name} {' '.join(f'{v:.3g}' for v in values)}" for name, values in measured[key].items() if values)
        for key in ("normalised_with", "per_channel")
    )
    text = f"calibration: {measured['images']} images of {shape} from {measured['path']}"
    return f"{text}, {f'normalised with {used}' if used else 'not normalised'}; per channel {found}"


def check_runs(network: nn.Module, images: Tensor, path: Path, device: str | None) -> None:
    """Raise CalibrationError if the network cannot run on the images there."""
    import torch

    from ..network import Network
    from ..state import moved_to

    if not len(images):
        return
    try:
        with torch.no_grad(), moved_to(device, [network]):
            Network(network).run(images[:2])
    except Exception as error:  # the network is the user's own code, which may raise anything
        where = f"{path}: the model cannot run on its images of {'x'.join(map(str, images.shape[1:]))}"
        raise CalibrationError(f"{where}{f' on {device}' if device else ''}: {error}") from error
