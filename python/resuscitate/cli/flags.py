"""What the commands have in common: how options are declared, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


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


def parse_steps(text: str | int) -> int | list[float]:
    """A number of steps, or the sparsities to stop at."""
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


def check_suffix(path: Path | None) -> Path | None:
    """A name for safetensors, if any."""
    if path is not None and path.suffix != ".safetensors":
        raise typer.BadParameter(f"it is written as safetensors: name it {path.with_suffix('.safetensors')}")
    return path


def check_report(path: Path | None) -> Path | None:
    """A name for a report, if any."""
    if path is not None and path.suffix not in (".json", ".csv") and not path.is_dir():
        raise typer.BadParameter(f"a report is written as .json or .csv, not {path.suffix or 'without an ending'}")
    return path


def opt(help: str, *names: str, **more: Any) -> Any:
    """An option with its help."""
    return typer.Option(*names, help=help, **more)


SOURCES = "an .npz, .npy, folder, .parquet, .tar shards, or package.module:loader"
Model = Annotated[str, opt("A name, such as resnet20, or package.module:factory.", "--model", "-m")]
Include = Annotated[list[str] | None, opt("Layers to take, as a glob over names; repeatable.", metavar="GLOB")]
Exclude = Annotated[list[str] | None, opt("Layers to leave out, likewise; repeatable.", metavar="GLOB")]
Output = Annotated[Path, opt("The .safetensors file to write.", "--output", "-o", callback=check_suffix)]
WrittenMasks = Annotated[Path | None, opt("Write the masks to this .safetensors file too.", callback=check_suffix)]
Calibration = Annotated[Path, opt(f"Unlabelled images: {SOURCES}.", "--calibration", "-c")]
Images = Annotated[Path | None, opt("Unlabelled images, for what is measured.", "--calibration", "-c")]
MaxSamples = Annotated[int | None, opt("At most so many images.", min=1)]
BatchSize = Annotated[int, opt("Images a step.", "--batch-size", "-b", min=1)]
Mean = Annotated[Any, opt("To subtract per channel: 0.485,0.456,0.406.", parser=parse_numbers, metavar="LIST")]
Std = Annotated[Any, opt("Then to divide by, per channel.", parser=parse_numbers, metavar="LIST")]
Size = Annotated[Any, opt("Of image files: resize to 224 or 224x160.", parser=parse_size, metavar="PIXELS")]
Precision = Annotated[str | None, opt("Autocast to bf16 or fp16; default: as the model is.")]
Device = Annotated[str | None, opt("Where to run, such as cuda.")]
Workers = Annotated[int, opt("Processes that read image files.", "--workers", "-j", min=0)]
Seed = Annotated[int, opt("Of the shuffle of the images.")]
Memory = Annotated[str | None, opt("For images and activations: 4GiB; default: half of what is free.")]
Scratch = Annotated[Path | None, opt("Folder for what exceeds --memory.")]
OnNonfinite = Annotated[str, opt("Images with NaN or infinite activations: raise, or skip.")]
Report = Annotated[Path | None, opt("Write the report to this .json or .csv file.", callback=check_report)]
Timeout = Annotated[float, opt("Under torchrun: seconds to wait for another rank.", min=1)]
