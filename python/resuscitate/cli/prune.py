"""`resuscitate prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..deploy.checkpoints import write_state_dict
from ..network.masks import Masks
from ..pruning.sparsify import Indivisible, sparsify
from ..runtime.options import DEFAULTS
from . import flags
from .application import app, made_by, options_of, run_time_options, show
from .flags import opt
from .inputs import load_model, read_images

Allocation = Literal["global", "uniform", "erk", "lamp", "rr"]  # "measured" is for `compress`


@app.command()
@flags.takes(flags.FLOORS | flags.LAYERS | flags.RUN)
def prune(
    model: flags.Model,
    dense: flags.Dense,
    output: flags.Output,
    sparsity: Annotated[float | None, opt("Fraction of the weights that is pruned, such as 0.9.")] = None,
    allocation: Annotated[Allocation, opt("How it is distributed; rr reads --calibration.")] = "global",
    pattern: Annotated[
        str, opt("unstructured, filter, channels, or n:m, such as 2:4, which keeps 2 of 4.")
    ] = "unstructured",
    densities: flags.Densities = None,
    indivisible: Annotated[Indivisible, opt("Of n:m, layers that m does not divide.")] = "dense",
    calibration: Annotated[Path | None, opt("Unlabelled images, to measure on.", "--calibration", "-c")] = None,
    max_samples: flags.MaxSamples = 256,
    masks: flags.WrittenMasks = None,
    **given: Any,
) -> None:
    """Set the smallest weights to zero."""
    options = options_of(locals())
    if sparsity is None and not densities and ":" not in pattern:
        raise typer.BadParameter("give --sparsity, such as 0.9, or --densities")
    network = load_model(model, dense)
    images, described = None, []
    if calibration is not None:
        found = read_images(options)
        images, described = found.all, [found.describe()]
    elif allocation == "rr" or pattern == "channels":
        raise typer.BadParameter(f"{'allocation rr' if allocation == 'rr' else 'channels'} needs images: --calibration")
    names = ["allocation", "pattern", "indivisible", *flags.FLOORS, *flags.LAYERS]
    chosen = {name: options[name] for name in names} | {"densities": flags.parse_densities(densities)}
    chosen["example" if pattern == "channels" else "calibration"] = images
    running = run_time_options(options)
    if allocation != "rr":  # nothing is measured: sparsify refuses what is given, but for the choice of the images
        unsaid = {**DEFAULTS, "max_samples": max_samples, "seed": options["seed"]}
        running = {name: value for name, value in running.items() if value != unsaid[name]}
    pruned = sparsify(network, sparsity, **chosen, **running)
    about = made_by("prune", options)
    if masks is not None:
        pruned.save(masks, about)
    write_state_dict(output, network.state_dict(), about)
    zeros, notes = Masks.from_zeros(network), list[str]()
    if len(zeros) and zeros.sparsity > pruned.sparsity + 1e-3:
        notes = [f"{zeros.sparsity:.2%} of the weights of the network are zero: it had zeros before"]
    show(pruned, *notes, *described, f"written to {output}")
