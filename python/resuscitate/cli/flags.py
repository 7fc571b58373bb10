"""The options that several commands have, and how values are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..runtime.options import DEFAULTS
from ..utils.files import check_writable

Options = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])


def parse_numbers(text: str) -> list[float]:
    """0.5 or 0.485,0.456,0.406"""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor several such as 0.485,0.456,0.406") from None


def parse_size(text: str) -> tuple[int, int]:
    """224 or 224x160, height before width."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise typer.BadParameter(f"{text!r} is not a size such as 224 or 224x160 (height x width)")
    return int(height), int(width or height)


def parse_names(text: str) -> list[str]:
    """flip or flip,crop"""
    return text.replace(",", " ").split()


def parse_steps(text: str | int) -> int | list[float]:
    """A number of steps, or the sparsity after each step."""
    if isinstance(text, int) or text.isdecimal():
        return int(text)
    return parse_numbers(text)


def parse_densities(given: list[str] | None) -> dict[str, float] | None:
    """GLOB=DENSITY, any number of times."""
    found = {}
    for text in given or ():
        glob, _, density = text.rpartition("=")
        try:
            found[glob] = float(density)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not GLOB=DENSITY, such as conv1=1.0") from None
    return found or None


def check_safetensors(path: Path | None) -> Path | None:
    """Refuse an ending other than .safetensors, and a place where no file can be written."""
    if path is not None:
        if path.suffix != ".safetensors":
            raise typer.BadParameter(f"it is written as safetensors: name it {path.with_suffix('.safetensors')}")
        check_writable(path)
    return path


def check_report(path: Path | None) -> Path | None:
    """Refuse another ending than those of a report, and a folder where no file can be written."""
    if path is not None:
        if path.suffix not in (".json", ".csv") and not path.is_dir():
            raise typer.BadParameter(f"a report is written as .json or .csv, not {path.suffix or 'without an ending'}")
        check_writable(path)
    return path


def opt(help: str, *names: str, **more: Any) -> Any:
    """An option with its help."""
    return typer.Option(*names, help=help, **more)


SOURCES = "an .npz, .npy, folder, .parquet, .tar shards, or package.module:loader"
Model = Annotated[str, opt("A name, such as resnet20, or package.module:factory, or file.py:factory.", "--model", "-m")]
Dense = Annotated[Path, opt("The weights before pruning: .safetensors, .pt or .pth.")]
Pruned = Annotated[Path, opt("The pruned weights: .safetensors, .pt or .pth.")]
Calibration = Annotated[Path, opt(f"Unlabelled images: {SOURCES}.", "--calibration", "-c")]
MaxSamples = Annotated[int | None, opt("Read at most so many images.", min=1)]
Output = Annotated[Path, opt("The .safetensors file to write.", "--output", "-o", callback=check_safetensors)]
WrittenMasks = Annotated[Path | None, opt("Write the masks to this .safetensors file too.", callback=check_safetensors)]
Report = Annotated[Path | None, opt("Write the report to this .json or .csv file.", callback=check_report)]
Json = Annotated[bool, opt("Print the report as JSON.", "--json")]
Journals = Annotated[Path | None, opt("Folder of journals: a killed run continues from it.")]
Densities = Annotated[list[str] | None, opt("Layers with a fixed density: GLOB=DENSITY; repeatable.")]

# groups of options that commands take with `takes`
LAYERS: Options = {
    "include": Annotated[list[str] | None, opt("Layers to take, as a glob over names; repeatable.", metavar="GLOB")],
    "exclude": Annotated[list[str] | None, opt("Layers to leave out, likewise; repeatable.", metavar="GLOB")],
}
FLOORS: Options = {
    "min_per_layer": Annotated[int, opt("Weights kept in each layer at least.", min=0)],
    "min_per_channel": Annotated[int, opt("Weights kept in each output channel at least.", min=0)],
}
PIXELS: Options = {
    "mean": Annotated[Any, opt("To subtract per channel: 0.485,0.456,0.406.", parser=parse_numbers, metavar="LIST")],
    "std": Annotated[Any, opt("Then to divide by, per channel.", parser=parse_numbers, metavar="LIST")],
    "size": Annotated[Any, opt("Resize image files to 224 or 224x160.", parser=parse_size, metavar="PIXELS")],
}
RUN: Options = PIXELS | {  # of the images, and of every function that measures: see `RunOptions`
    "max_samples": MaxSamples,
    "batch_size": Annotated[int, opt("Images in each batch.", "--batch-size", "-b", min=1)],
    "seed": Annotated[int, opt("Seed of the shuffle of the images.")],
    "dtype": Annotated[str | None, opt("Autocast to bf16 or fp16; default: as the model is.")],
    "device": Annotated[str | None, opt("Where to run, such as cuda.")],
    "memory": Annotated[str | None, opt("For images and activations: 4GiB; default: half of what is free.")],
    "scratch": Annotated[Path | None, opt("Folder for what exceeds --memory.")],
    "on_nonfinite": Annotated[str, opt("Images with NaN or infinite activations: raise, or skip.")],
}
RANKS: Options = {
    "workers": Annotated[int, opt("Processes that read image files.", "--workers", "-j", min=0)],
    "timeout": Annotated[float, opt("Under torchrun: seconds to wait for another rank.", min=1)],
}
REPAIRS: Options = {
    "augment": Annotated[
        Any, opt("Use changed copies of the images too: flip, crop, or flip,crop.", parser=parse_names, metavar="LIST")
    ],
    "draws": Annotated[int, opt("Number of changed copies of each image.", min=1)],
    "keep_worse": Annotated[bool, opt("Keep what takes the outputs further from the dense network's.")],
}
PRESETS: Options = {
    **DEFAULTS,
    "keep_worse": False,
    "augment": None,
    "draws": 1,
    "min_per_layer": 1,
    "min_per_channel": 0,
    "workers": 0,
    "timeout": 600.0,
}


def takes(options: Options) -> Callable[[Command], Command]:
    """Give a command, whose last parameter is `**given`, more options, less those that it has.

    They are written into its signature, which Typer reads when it parses.
    """

    def extend(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        new = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=PRESETS.get(name), annotation=annotation)
            for name, annotation in options.items()
            if name not in signature.parameters
        ]
        command.__signature__ = signature.replace(parameters=own + new)  # type: ignore[attr-defined]
        return command

    return extend
