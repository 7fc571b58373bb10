"""`resuscitate export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..deploy.export import check_target
from ..deploy.export import export as run
from . import flags
from .application import app, made_by, options_of, show
from .flags import opt
from .inputs import check_runs, load_model, read_images


@app.command()
@flags.takes(flags.PIXELS)
def export(
    model: flags.Model,
    weights: Annotated[Path, opt("What to export: .safetensors, .pt or .pth.")],
    calibration: flags.Calibration,
    output: Annotated[Path, opt("A .safetensors, .pt2 (torch.export) or .onnx file to write.", "--output", "-o")],
    fold: Annotated[bool, opt("Fold each BatchNorm into the layer that it alone reads.")] = False,
    tolerance: Annotated[float, opt("Largest accepted difference, relative to the largest output.")] = 1e-4,
    **given: Any,
) -> None:
    """Write a network for others to run; the file is read again and compared before it appears."""
    options = options_of(locals())
    check_target(output)
    network = load_model(model, weights)
    images = read_images(options, max_samples=8, seed=0).all
    check_runs(network, images, calibration, None)
    done = run(network, output, images, fold=fold, tolerance=tolerance, provenance=made_by("export", options))
    zeros = f"{done.sparsity:.2%} of the weights are zero{f', {done.folded} BatchNorms folded' if fold else ''}"
    show(f"written to {done.path}: {zeros}; read again, its outputs differ by {done.error:.1e} of the largest at most")
