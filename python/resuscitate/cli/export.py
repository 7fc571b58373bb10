"""`resuscitate export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import flags
from .application import app, options_of, show
from .flags import opt
from .inputs import build_model, check_runs, read_images


@app.command()
def export(
    model: flags.Model,
    weights: Annotated[Path, opt("What to export: .safetensors, .pt or .pth.")],
    calibration: flags.Calibration,
    output: Annotated[Path, opt("A .safetensors, .pt2 (torch.export) or .onnx file to write.", "--output", "-o")],
    fold: Annotated[bool, opt("Fold each BatchNorm into the layer that it alone reads.")] = False,
    tolerance: Annotated[float, opt("Of the largest output, the difference to accept.")] = 1e-4,
    mean: flags.Mean = None,
    std: flags.Std = None,
    size: flags.Size = None,
) -> None:
    """Write a network for others to run; the file is read again and compared before it stays."""
    options = options_of(locals())
    from ..deploy.checkpoints import load_weights, provenance
    from ..deploy.export import check_target
    from ..deploy.export import export as run

    check_target(output)
    network = build_model(model)
    load_weights(network, weights)
    images = read_images(calibration, mean, std, size, 8, 0).all
    check_runs(network, images, calibration, None)
    done = run(network, output, images, fold=fold, tolerance=tolerance, provenance=provenance("export", options))
    folded = f", {done.folded} BatchNorms folded" if fold else ""
    zeros = f"{done.sparsity:.2%} of the weights are zero{folded}"
    show(f"written to {done.path}: {zeros}; read again, its outputs differ by {done.error:.1e} of the largest at most")
