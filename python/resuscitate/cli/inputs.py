"""What commands read: a model by its name, weights, images by their path."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import asr_kernels as ak

from ..data import images as image_files
from ..data.calibration import read_batches
from ..data.sources import KINDS
from ..deploy.checkpoints import load_weights
from ..errors import CalibrationError, ResuscitateError
from ..models import build
from ..network.runner import Network
from ..network.snapshot import moved_to
from ..runtime import activations
from ..runtime.distributed import Ranks, launched
from ..workflows.recoverability import Accuracy
from .flags import Options
from .method_options import import_users

HEAD = 512  # images to look at


def build_model(name: str) -> nn.Module:
    """A new model in eval mode: by its name in `models.py`, from a library of models, or from the user's own module.

    "timm:NAME", "torchvision:NAME", "hf:FOLDER" with a Hugging Face configuration for image classification, or a
    function that returns the model, `package.module:factory` or `file.py:factory`. Without trained weights and without
    network access.
    Raises typer.BadParameter for an unknown name, ResuscitateError where the model cannot be built.
    """
    source, _, wanted = name.partition(":")
    if not wanted:
        try:
            return build(name).eval()
        except ValueError as error:
            others = "timm:NAME, torchvision:NAME, hf:FOLDER, package.module:factory, or file.py:factory"
            raise typer.BadParameter(f"{error}, {others}") from None
    try:
        network = LIBRARIES[source](wanted) if source in LIBRARIES else getattr(import_users(source), wanted)()
    except ModuleNotFoundError as error:
        needs = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
        remedy = f"; pip install {needs[source]}" if error.name == needs.get(source) else ""
        raise ResuscitateError(f"--model {name} cannot be built: {error}{remedy}") from error
    except Exception as error:  # the user's own code, or a library's, may raise anything
        remedy = ""
        if "operator torchvision::" in str(error):
            remedy = (
                f"; this torchvision was built for another torch than {torch.__version__}: install the one made for it"
            )
        raise ResuscitateError(f"--model {name} cannot be built: {type(error).__name__}: {error}{remedy}") from error
    if not isinstance(network, nn.Module):
        raise ResuscitateError(f"--model {name} gave a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()


def _from_transformers(folder: str) -> Any:
    transformers = importlib.import_module("transformers")
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"there is no folder {folder}")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModelForImageClassification.from_config(config)


LIBRARIES: dict[str, Callable[[str], Any]] = {
    "timm": lambda name: importlib.import_module("timm").create_model(name, pretrained=False),
    "torchvision": lambda name: importlib.import_module("torchvision.models").get_model(name, weights=None),
    "hf": _from_transformers,
}


def load_model(name: str, weights: Path | str) -> nn.Module:
    """A model by its name, with the weights of a file, which may have fewer channels."""
    network = build_model(name)
    load_weights(network, weights, smaller=True)
    return network


def read_channels(path: Path) -> dict[str, list[int]]:
    """The kept channels, {layer: [indices]}, from a JSON file. Raises typer.BadParameter for other content."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"{path}: not JSON ({error})") from None
    lists = isinstance(found, dict) and all(isinstance(each, list) for each in found.values())
    if not lists or not all(type(index) is int for each in found.values() for index in each):
        raise typer.BadParameter(f'{path}: needs lists of indices by layer, such as {{"conv1": [0, 2, 5]}}')
    return found


@dataclass
class Images:
    """The images of --calibration: `all`, a tensor or batches read on demand; the first ones; facts for the report."""

    all: Any
    head: Tensor
    measured: dict[str, Any]

    def describe(self) -> str:
        """One line for the terminal, which shows a wrong normalisation."""
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


@contextmanager
def opened(network: nn.Module, options: Options, **how: Any) -> Iterator[tuple[Images, Ranks]]:
    """The ranks of a command, and the images of this rank, on which the network is known to run; see `read_images`."""
    with launched(options["timeout"]) as group:
        ranks = Ranks(group)
        found = read_images(options, (ranks.rank, ranks.size), options["workers"], **how)
        check_runs(network, found.head, options["calibration"], options["device"])
        yield found, ranks


def read_images(options: Options, shard: tuple[int, int] = (0, 1), workers: int | None = None, **how: Any) -> Images:
    """This rank's images, by the options of a command; `how` replaces some of these, such as max_samples.

    calibration: what `load_images` reads, or `package.module:loader`, a function that returns batches; those are used
        in their order and unchanged, image i by rank i modulo the ranks.
    workers: None: all in one tensor. Else the batches of a function are read one by one; so are files, by so many
        processes, if there are any or if the images would fill more than a quarter of the free memory.
    """
    path, options = options["calibration"], {**options, **how}
    module, _, loader = str(path).partition(":")
    if loader and module not in KINDS and not path.exists():
        if any(options[name] is not None for name in ("mean", "std", "size")):
            raise typer.BadParameter(f"{path} gives images as they are: leave --mean, --std and --size out")
        dealt = Dealt(module, loader, options["max_samples"], shard)
        parts = list(read_batches(dealt, max_samples=None if workers is None else HEAD, allow_empty=True))
        alike = [part for part in parts if part.shape[1:] == parts[0].shape[1:]]
        if workers is None and len(alike) < len(parts):
            raise CalibrationError(f"{path}: its images have different sizes; bring them to one size")
        head = torch.cat(alike) if alike else torch.empty(0, 0)
        measured = dealt.counts = _measure(options, head)
        return Images(head if workers is None else dealt, head[:HEAD], measured)
    stream = image_files.ImageStream(path, **_reading(options), shard=shard, batch_size=options.get("batch_size", HEAD))
    head = stream.head(stream.images if workers is None else HEAD)
    if workers is not None:
        size = head[:1].nbytes  # 0 where this rank has no image
        if workers or stream.images * size > activations.free_memory(head.device) // 4:
            batches = DataLoader(stream, batch_size=None, num_workers=workers)
            return Images(batches, head, _measure(options, head) | {"images": stream.images})
    images = head if len(head) == stream.images else stream.head(stream.images)
    return Images(images, images[:HEAD], _measure(options, images))


def _reading(options: Options) -> dict[str, Any]:
    return {name: options[name] for name in ("mean", "std", "size", "max_samples", "seed")}


class Dealt:
    """This rank's share of the batches that the user's function returns, at most `limit` images of all ranks.

    The function is called for each pass. `counts["images"]` is the number of images that this rank has had.
    """

    def __init__(self, module: str, loader: str, limit: int | None, shard: tuple[int, int]) -> None:
        self.module, self.loader, self.limit, self.shard = module, loader, limit, shard
        self.counts: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Tensor]:
        (rank, ranks), seen, mine = self.shard, 0, 0
        try:
            for images in read_batches(getattr(import_users(self.module), self.loader)(), max_samples=self.limit):
                share = images[(rank - seen) % ranks :: ranks]
                seen += len(images)
                mine += len(share)
                self.counts["images"] = mine
                if len(share):
                    yield share
        except CalibrationError:
            raise
        except Exception as error:  # the user's own code, which may raise anything
            where = f"{self.module}:{self.loader} gives no images"
            raise CalibrationError(f"{where}: {type(error).__name__}: {error}") from error


def _measure(options: Options, images: Tensor) -> dict[str, Any]:
    """The number of images, their shape, and the mean and deviation of each channel after normalisation."""
    moments = ak.channel_moments(images) if len(images) else ak.ChannelMoments.empty(images.shape[1])
    measured = {"mean": moments.mean.tolist(), "std": moments.var.sqrt().tolist()}
    normalised = {name: options[name] for name in ("mean", "std") if options[name]}
    described = {"path": str(options["calibration"]), "images": len(images), "shape": list(images.shape[1:])}
    return described | {"normalised_with": normalised, "per_channel": measured}


def read_labelled(path: Path, options: Options, limit: int | None = None) -> Accuracy:
    """Images and labels of one .npz. Raises ResuscitateError where their numbers differ."""
    images = image_files.load_images(path, **_reading({**options, "max_samples": limit}))
    labels = image_files.load_labels(path, max_samples=limit, seed=options["seed"])
    if len(labels) != len(images):
        raise ResuscitateError(f"{path}: {len(images)} images and {len(labels)} labels")
    return Accuracy(images, labels)


def check_runs(network: nn.Module, images: Tensor, path: Path, device: str | None) -> None:
    """Raise CalibrationError if the network cannot run on the images."""
    if not len(images):
        return
    try:
        with torch.no_grad(), moved_to(device, [network]):
            Network(network).run(images[:2])
    except Exception as error:  # the network is the user's own code, which may raise anything
        where = f"{path}: the model cannot run on its images of {'x'.join(map(str, images.shape[1:]))}"
        raise CalibrationError(f"{where}{f' on {device}' if device else ''}: {error}") from error
