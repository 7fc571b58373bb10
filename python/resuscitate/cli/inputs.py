"""What the commands are given: a model by its name, images by their path; and whether the one runs on the other."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import CalibrationError, ResuscitateError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.images import ImageStream

HEAD = 512  # images to look at


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


@dataclass
class Images:
    """What the images of --calibration are to a command: to walk over, to look at, and to report."""

    all: Any  # a tensor, or batches that are read as they are wanted
    head: Tensor  # the first few
    measured: dict[str, Any]

    def describe(self) -> str:
        """One line for the terminal: a wrong normalisation is easier to see than to find."""
        used, found = (
            ", ".join(f"{name} {' '.join(f'{v:.3g}' for v in values)}" for name, values in self.measured[key].items())
            for key in ("normalised_with", "per_channel")
        )
        shape, path = "x".join(map(str, self.measured["shape"])), self.measured["path"]
        partly = f" of the first {len(self.head)}" if not hasattr(self.all, "shape") else ""
        return (
            f"calibration: {self.measured['images']} images of {shape} from {path}, "
            f"{f'normalised with {used}' if used else 'not normalised'}; per channel{partly} {found}"
        )


def read_images(
    path: Path,
    mean: Any,
    std: Any,
    size: Any,
    limit: int | None,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    batch_size: int = 128,
) -> Images:
    """This rank's images.

    path: what `load_images` reads, or `package.module:loader`, a function that returns batches; those are taken in
        their order and as they are, image i by rank i modulo the ranks.
    workers: None: all in one tensor. Else what a function of the user's gives is read batch by batch; files are, by so
        many processes, if there are any or if the images would fill more than a quarter of the memory that is free.
    """
    import torch
    from torch.utils.data import DataLoader

    from ..data.images import ImageStream
    from ..data.sources import KINDS

    module, _, loader = str(path).partition(":")
    if loader and module not in KINDS and not path.exists():
        if any(option is not None for option in (mean, std, size)):
            raise typer.BadParameter(f"{path} gives images as they are: leave --mean, --std and --size out")
        dealt = Dealt(module, loader, limit, shard)
        head = _head(dealt) if workers is not None else torch.cat(list(dealt))
        measured = _measure(path, head, mean, std)
        dealt.counts = measured
        return Images(head if workers is None else dealt, head[:HEAD], measured)
    options: dict[str, Any] = {"mean": mean, "std": std, "size": size, "max_samples": limit, "seed": seed}
    stream = ImageStream(path, **options, shard=shard, batch_size=batch_size)
    head = stream.head(HEAD)
    if workers is None or not (workers or _fills_memory(stream, head)):
        images = stream.head(stream.images)
        return Images(images, images[:HEAD], _measure(path, images, mean, std))
    batches = DataLoader(stream, batch_size=None, num_workers=workers)
    return Images(batches, head, _measure(path, head, mean, std) | {"images": stream.images})


class Dealt:
    """A rank's share of the batches that a function of the user's returns, at most `limit` images of all ranks'.

    It is called anew for each pass. `counts["images"]` is kept at how many this rank had.
    """

    def __init__(self, module: str, loader: str, limit: int | None, shard: tuple[int, int]) -> None:
        self.source, self.limit, self.shard = (module, loader), limit, shard
        self.counts: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Tensor]:
        from ..data.calibration import read_batches

        (rank, ranks), seen, mine = self.shard, 0, 0
        try:
            for images in read_batches(_from_module(*self.source), max_samples=self.limit):
                share = images[(rank - seen) % ranks :: ranks]
                seen += len(images)
                mine += len(share)
                self.counts["images"] = mine
                if len(share):
                    yield share
        except CalibrationError:
            raise
        except Exception as error:  # the user's own code, which may raise anything
            where = ":".join(self.source)
            raise CalibrationError(f"{where} gives no images: {type(error).__name__}: {error}") from error


def _head(batches: Iterable[Tensor]) -> Tensor:
    import torch

    parts: list[Tensor] = []
    for batch in batches:
        parts.append(batch)
        if sum(map(len, parts)) >= HEAD:
            break
    return torch.cat(parts)[:HEAD] if parts else torch.empty(0, 0)


def _fills_memory(stream: ImageStream, head: Tensor) -> bool:
    from ..runtime.activations import free_memory

    each = head[0].nbytes if len(head) else 0
    return stream.images * each > free_memory(head.device) // 4


def _measure(path: Path, images: Tensor, mean: Any, std: Any) -> dict[str, Any]:
    """Of images: how many, their shape, and the mean and deviation of each channel as they are now."""
    import asr_kernels as ak

    moments = ak.channel_moments(images) if len(images) else ak.ChannelMoments.empty(images.shape[1])
    measured = {"mean": moments.mean.tolist(), "std": moments.var.sqrt().tolist()}
    normalised = {name: values for name, values in (("mean", mean), ("std", std)) if values}
    described = {"path": str(path), "images": len(images), "shape": list(images.shape[1:])}
    return described | {"normalised_with": normalised, "per_channel": measured}


def read_labelled(path: Path, mean: Any, std: Any, size: Any, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels from one .npz. Raises ResuscitateError where they are not as many."""
    from ..data.images import load_images, load_labels

    images = load_images(path, mean=mean, std=std, size=size, max_samples=limit, seed=seed)
    labels = load_labels(path, max_samples=limit, seed=seed)
    if len(labels) != len(images):
        raise ResuscitateError(f"{path}: {len(images)} images and {len(labels)} labels")
    return images, labels


def check_runs(network: nn.Module, images: Tensor, path: Path, device: str | None) -> None:
    """Raise CalibrationError if the network cannot run on the images there."""
    import torch

    from ..network.runner import Network
    from ..network.snapshot import moved_to

    if not len(images):
        return
    try:
        with torch.no_grad(), moved_to(device, [network]):
            Network(network).run(images[:2])
    except Exception as error:  # the network is the user's own code, which may raise anything
        where = f"{path}: the model cannot run on its images of {'x'.join(map(str, images.shape[1:]))}"
        raise CalibrationError(f"{where}{f' on {device}' if device else ''}: {error}") from error
