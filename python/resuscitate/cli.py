"""The command line: `resuscitate demo | prune | repair`, every option named like its Python keyword.

Results go to standard output; progress, where it is a terminal, and errors to standard error. Exit codes: 0 done,
1 it could not be done (a message of one line says why), 2 the command makes no sense.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import CalibrationError, ResuscitateError
from .repair import Method, OnNonfinite, Schedule

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor, nn

Recalibrate = Literal["auto", "exact", "ema", "none"]
Allocation = Literal["global", "uniform"]


class _PlainErrors(TyperGroup):
    """Turns the errors that a user can cause into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ResuscitateError, OSError, ValueError) as error:
            message = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                message = f"{error.filename}: {error.strerror}"
            typer.echo(f"Error: {' '.join(message.split())}", err=True)
            # a value that the library refuses is a mistake in the command, all else one in the files
            raise typer.Exit(1 if isinstance(error, ResuscitateError | OSError) else 2) from error


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor several such as 0.485,0.456,0.406") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise typer.BadParameter(f"{text!r} is not a size such as 224 or 224x160 (height x width)")
    return int(height), int(width or height)


def _prior(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _safetensors(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise typer.BadParameter(f"weights are written as safetensors: name it {path.with_suffix('.safetensors')}")
    return path


def _opt(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, **more)


Model = Annotated[str, _opt("A name, such as resnet20, or package.module:factory.", "--model", "-m")]
Include = Annotated[list[str] | None, _opt("Layers to take, as a glob over names; repeatable.", metavar="GLOB")]
Exclude = Annotated[list[str] | None, _opt("Layers to leave out, likewise; repeatable.", metavar="GLOB")]
Output = Annotated[Path, _opt("The .safetensors file to write.", "--output", "-o", callback=_safetensors)]

app = typer.Typer(
    name="resuscitate",
    cls=_PlainErrors,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Bring a collapsed pruned network back from a few unlabelled images.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"resuscitate {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, _opt("Log what is done, on standard error.", "--verbose", "-v")] = False,
    show: Annotated[bool, _opt("Show the version.", "--version", callback=_version, is_eager=True)] = False,
) -> None:
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("resuscitate").setLevel(logging.INFO)


@app.command()
def demo(
    seed: Annotated[int, _opt("Of the split, the weights and the order of training.")] = 0,
    epochs: Annotated[int, _opt("Of training.", min=1)] = 15,
    output: Annotated[Path, _opt("The picture (.png, .pdf, .svg).", "--output", "-o")] = Path("demo.png"),
    plot: Annotated[bool, _opt("Draw the picture.")] = True,
) -> None:
    """Train a small network on real digits, prune it until it collapses, and repair it: under a minute."""
    from .checkpoints import check_writable
    from .demo import run
    from .plots import draw_demo, have_matplotlib

    if plot:
        check_writable(output)
    result = run(seed=seed, epochs=epochs)
    _show(result)
    if plot and have_matplotlib():
        draw_demo(result, output)
        _show(f"picture: {output}")
    elif plot:
        _show("picture skipped: it needs matplotlib, pip install 'resuscitate[plots]'")


@app.command()
def prune(
    model: Model,
    dense: Annotated[Path, _opt("The trained weights: .safetensors, .pt or .pth.")],
    output: Output,
    sparsity: Annotated[float | None, _opt("Fraction of the weights that goes, such as 0.9.")] = None,
    allocation: Annotated[Allocation, _opt("How it is shared out over the layers.")] = "global",
    pattern: Annotated[str, _opt("unstructured, or n:m (n kept of every m) such as 2:4.")] = "unstructured",
    include: Include = None,
    exclude: Exclude = None,
) -> None:
    """Set the smallest weights to zero."""
    options = _options(locals())
    from rich.table import Table

    from .checkpoints import check_writable, load_weights, provenance, write_state_dict
    from .sparsify import sparsify

    check_writable(output)
    network = _build(model)
    load_weights(network, dense)
    chosen = {name: options[name] for name in ("allocation", "pattern", "include", "exclude")}
    masks = sparsify(network, sparsity, **chosen)
    write_state_dict(output, network.state_dict(), provenance("prune", options))
    table = Table("layer", "shape", box=None, header_style="bold")
    for title in ("kept", "of", "sparsity"):
        table.add_column(title, justify="right")
    for row in masks.table():
        table.add_row(row.layer, "x".join(map(str, row.shape)), str(row.kept), str(row.total), f"{row.sparsity:.2%}")
    _show(table, f"{masks.sparsity:.2%} of these weights are zero; written to {output}")


@app.command()
def repair(
    model: Model,
    pruned: Annotated[Path, _opt("The pruned weights: .safetensors, .pt or .pth.")],
    calibration: Annotated[Path, _opt("Unlabelled images: an .npz, an .npy or a folder.", "--calibration", "-c")],
    output: Output,
    dense: Annotated[Path | None, _opt("The weights before pruning; only method bn does without.")] = None,
    method: Annotated[Method, _opt("Match the dense outputs by a gain, or BatchNorm alone.")] = "asr",
    schedule: Annotated[Schedule, _opt("Measure on repaired layers, or on the broken net.")] = "sequential",
    recalibrate: Annotated[Recalibrate, _opt("BatchNorm; auto: exact for bn, else none (stays).")] = "auto",
    max_samples: Annotated[int | None, _opt("At most so many images.", min=1)] = None,
    gain_samples: Annotated[int | None, _opt("At most so many for the gains.", min=1)] = None,
    recalibrate_samples: Annotated[int | None, _opt("At most so many for an exact BatchNorm.", min=1)] = None,
    batch_size: Annotated[int, _opt("Images a step.", "--batch-size", "-b", min=1)] = 128,
    mean: Annotated[Any, _opt("To subtract per channel: 0.485,0.456,0.406.", parser=_numbers, metavar="LIST")] = None,
    std: Annotated[Any, _opt("Then to divide by, per channel.", parser=_numbers, metavar="LIST")] = None,
    size: Annotated[Any, _opt("Of image files: resize to 224 or 224x160.", parser=_size, metavar="PIXELS")] = None,
    prior: Annotated[Any, _opt("Of asr: median, mean or a variance.", parser=_prior, metavar="PRIOR")] = "median",
    bias: Annotated[bool, _opt("Match the means too.")] = True,
    eps: Annotated[float, _opt("Added to variances that are divided by.")] = 1e-8,
    include: Include = None,
    exclude: Exclude = None,
    skip_first: Annotated[bool, _opt("Leave the first convolution alone.")] = True,
    skip_last: Annotated[bool | None, _opt("Leave the classifier alone; default: if its inputs differ.")] = None,
    ema_batches: Annotated[int, _opt("Batches of an ema recalibration.", min=1)] = 20,
    ema_batch_size: Annotated[int, _opt("Their size.", min=1)] = 128,
    ema_momentum: Annotated[float, _opt("Its momentum.")] = 0.1,
    on_nonfinite: Annotated[OnNonfinite, _opt("On images with NaN or infinite activations.")] = "raise",
    device: Annotated[str | None, _opt("Where to run, such as cuda.")] = None,
    seed: Annotated[int, _opt("Of the shuffle of the images.")] = 0,
    report: Annotated[Path | None, _opt("Write the report as JSON to this file.")] = None,
    json_: Annotated[bool, _opt("Print the report as JSON.", "--json")] = False,
) -> None:
    """Repair a pruned network from unlabelled images and write its weights."""
    options = _options(locals())
    if dense is None and method != "bn":
        raise typer.BadParameter(f"method {method} matches the dense outputs: give --dense, or --method bn")
    from .checkpoints import atomic, check_writable, load_weights, provenance, write_state_dict
    from .counting import most_images
    from .repair import repair as run

    for path in filter(None, (output, report)):
        check_writable(path)
    network, original = _build(model), None if dense is None else _build(model)
    load_weights(network, pruned)
    if original is not None and dense is not None:
        load_weights(original, dense)
    exact = recalibrate == "exact" or (recalibrate == "auto" and method == "bn")
    wanted = [] if method == "bn" else [gain_samples]
    wanted += [recalibrate_samples] if exact else [ema_batches * ema_batch_size] if recalibrate == "ema" else []
    images, measured = _images(calibration, mean, std, size, most_images(wanted, max_samples), seed)
    _check_runs(network, images, calibration, device)
    keywords = {name: options[name] for name in run.__kwdefaults__ if name in options}  # type: ignore[union-attr]
    keywords["recalibrate"] = None if recalibrate == "none" else recalibrate
    done = run(network, original, images, **keywords)
    made_by = provenance(method, options)
    document = {**done.to_dict(), "calibration": measured, "output": str(output), "provenance": made_by}
    text = json.dumps(document, indent=2)
    with ExitStack() as stack:
        if report is not None:
            stack.enter_context(atomic(report)).write_text(f"{text}\n")
        write_state_dict(output, network.state_dict(), made_by)
    if json_:
        typer.echo(text)
    else:
        _show(done, _describe(measured), f"written to {output}")


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command, ready for JSON, less those that say only where its results go."""
    return {
        name: str(value) if isinstance(value, Path) else value or None if isinstance(value, list) else value
        for name, value in given.items()
        if name not in ("output", "report", "json_")
    }


def _build(name: str) -> nn.Module:
    """A new model in eval mode, by its name in `models.py` or as what `package.module:factory` returns."""
    from torch import nn

    from .models import build

    module, _, factory = name.partition(":")
    if not factory:
        try:
            return build(name).eval()
        except ValueError as error:
            raise typer.BadParameter(f"{error}, or package.module:factory") from None
    sys.path.insert(0, os.getcwd())
    try:
        network = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # the factory is the user's own code, which may raise anything
        raise ResuscitateError(f"--model {name} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ResuscitateError(f"--model {name} gave a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()


def _images(path: Path, mean: Any, std: Any, size: Any, limit: int | None, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """The images, and what they are like, for a wrong normalisation is easier to see than to find."""
    import asr_kernels as ak

    from .calibration import load_images

    images = load_images(path, mean=mean, std=std, size=size, max_samples=limit, seed=seed)
    moments = ak.channel_moments(images)
    measured = {"mean": moments.mean.tolist(), "std": moments.var.sqrt().tolist()}
    described = {"path": str(path), "images": len(images), "shape": list(images.shape[1:])}
    return images, described | {"normalised_with": {"mean": mean, "std": std}, "per_channel": measured}


def _describe(measured: dict[str, Any]) -> str:
    shape = "x".join(map(str, measured["shape"]))
    used, found = (
        ", ".join(f"{name} {' '.join(f'{v:.3g}' for v in values)}" for name, values in measured[key].items() if values)
        for key in ("normalised_with", "per_channel")
    )
    text = f"calibration: {measured['images']} images of {shape} from {measured['path']}"
    return f"{text}, {f'normalised with {used}' if used else 'not normalised'}; per channel {found}"


def _check_runs(network: nn.Module, images: Tensor, path: Path, device: str | None) -> None:
    """Raise CalibrationError if the network cannot run on the images there."""
    import torch

    from .state import moved_to
    from .sweep import Network

    try:
        with torch.no_grad(), moved_to(device, [network]):
            Network(network).run(images[:2])
    except Exception as error:  # the network is the user's own code, which may raise anything
        where = f"{path}: the model cannot run on its images of {'x'.join(map(str, images.shape[1:]))}"
        raise CalibrationError(f"{where}{f' on {device}' if device else ''}: {error}") from error


def _show(*parts: RenderableType) -> None:
    """Print to standard output, at a width that cuts nothing off where that is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, highlight=False)
    for part in parts:
        console.print(part, markup=not isinstance(part, str), soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    app()
