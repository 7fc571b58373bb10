"""`resuscitate prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import flags
from .application import app, options_of, show
from .flags import opt
from .inputs import build_model, read_images

Allocation = Literal["global", "uniform", "erk", "lamp", "rr"]
Indivisible = Literal["dense", "pad", "raise"]


@app.command()
def prune(
    model: flags.Model,
    dense: Annotated[Path, opt("The trained weights: .safetensors, .pt or .pth.")],
    output: flags.Output,
    sparsity: Annotated[float | None, opt("Fraction of the weights that goes, such as 0.9.")] = None,
    allocation: Annotated[Allocation, opt("How it is shared out over the layers; rr reads --calibration.")] = "global",
    pattern: Annotated[str, opt("unstructured, filter, channels, or n:m (n kept of m) such as 2:4.")] = "unstructured",
    densities: Annotated[list[str] | None, opt("Layers to keep that much of: GLOB=DENSITY; repeatable.")] = None,
    min_per_layer: Annotated[int, opt("Weights that stay in each layer.", min=0)] = 1,
    min_per_channel: Annotated[int, opt("Weights that stay in each output channel.", min=0)] = 0,
    indivisible: Annotated[Indivisible, opt("Of n:m, layers that m does not divide.")] = "dense",
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    calibration: flags.Images = None,
    max_samples: flags.MaxSamples = 256,
    mean: flags.Mean = None,
    std: flags.Std = None,
    size: flags.Size = None,
    batch_size: flags.BatchSize = 128,
    dtype: flags.Precision = None,
    device: flags.Device = None,
    seed: flags.Seed = 0,
    masks: flags.WrittenMasks = None,
) -> None:
    """Set the smallest weights to zero."""
    options = options_of(locals())
    from ..deploy.checkpoints import load_weights, provenance, write_state_dict
    from ..pruning.sparsify import sparsify
    from ..utils.files import check_writable

    for path in filter(None, (output, masks)):
        check_writable(path)
    fixed = flags.parse_densities(densities)
    network = build_model(model)
    load_weights(network, dense)
    images, described = None, []
    if calibration is not None:
        found = read_images(calibration, mean, std, size, max_samples, seed)
        images, described = found.all, [found.describe()]
    elif allocation == "rr" or pattern == "channels":
        raise typer.BadParameter(f"{'allocation rr' if allocation == 'rr' else 'channels'} needs images: --calibration")
    names = ["allocation", "pattern", "min_per_layer", "min_per_channel", "indivisible", "include", "exclude"]
    names += ["batch_size", "dtype", "device", "seed"] if allocation == "rr" else []
    chosen = {name: options[name] for name in names}
    chosen["example" if pattern == "channels" else "calibration"] = images
    pruned = sparsify(network, sparsity, densities=fixed, **chosen)
    made_by = provenance("prune", options)
    if masks is not None:
        pruned.save(masks, made_by)
    write_state_dict(output, network.state_dict(), made_by)
    show(pruned, *described, f"written to {output}")
