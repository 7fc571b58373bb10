"""`resuscitate compress`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from .app import app, options_of, show
from .inputs import build_model, check_runs, read_images
from .options import (
    BatchSize,
    Calibration,
    Device,
    Exclude,
    Include,
    MaxSamples,
    Mean,
    Model,
    Output,
    Precision,
    Seed,
    Size,
    Std,
    Timeout,
    Workers,
    WrittenMasks,
    opt,
    parse_densities,
    parse_steps,
)
from .prune import Allocation


@app.command()
def compress(
    model: Model,
    dense: Annotated[Path, opt("The trained weights: .safetensors, .pt or .pth.")],
    calibration: Calibration,
    output: Output,
    sparsity: Annotated[float, opt("Fraction of the weights that goes, such as 0.9.")],
    allocation: Annotated[Allocation, opt("How it is shared out over the layers.")] = "global",
    pattern: Annotated[str, opt("unstructured or filter.")] = "unstructured",
    steps: Annotated[Any, opt("How many, or where to stop: 0.5,0.8,0.9.", parser=parse_steps, metavar="STEPS")] = 7,
    densities: Annotated[list[str] | None, opt("Layers to keep that much of: GLOB=DENSITY; repeatable.")] = None,
    min_per_layer: Annotated[int, opt("Weights that stay in each layer.", min=0)] = 1,
    min_per_channel: Annotated[int, opt("Weights that stay in each output channel.", min=0)] = 0,
    include: Include = None,
    exclude: Exclude = None,
    ridge: Annotated[
        float | None, opt("The pull towards the weights as they are; without it, by cross-validation.")
    ] = None,
    relu_aware: Annotated[bool, opt("Let go of errors that the ReLU behind a layer hides.")] = True,
    max_samples: MaxSamples = None,
    batch_size: BatchSize = 128,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    dtype: Precision = None,
    device: Device = None,
    memory: Annotated[str | None, opt("For images and activations: 4GiB; default: half of what is free.")] = None,
    scratch: Annotated[Path | None, opt("Folder for what exceeds that.")] = None,
    resume: Annotated[Path | None, opt("Folder of journals: a killed run goes on from it.")] = None,
    seed: Seed = 0,
    masks: WrittenMasks = None,
    report: Annotated[Path | None, opt("Write the report as JSON to this file.")] = None,
    workers: Workers = 0,
    timeout: Timeout = 600.0,
) -> None:
    """Prune in steps, and refit the rest after each from unlabelled images. Runs under torchrun too."""
    options = options_of(locals())
    from ..deploy.checkpoints import load_weights, provenance, write_state_dict
    from ..runtime.distributed import Ranks, launched
    from ..utils.files import atomic, check_writable
    from ..workflows.compress import compress as run

    for path in filter(None, (output, masks, report)):
        check_writable(path)
    fixed = parse_densities(densities)
    network = build_model(model)
    load_weights(network, dense)
    with launched(timeout) as group:
        ranks = Ranks(group)
        shard = ranks.rank, ranks.size
        images = read_images(calibration, mean, std, size, max_samples, seed, shard, workers, batch_size)
        check_runs(network, images.head, calibration, device)
        names = set(run.__kwdefaults__ or ()) & set(options) - {"densities"}
        keywords = {name: options[name] for name in names}
        done = run(network, sparsity, images.all, densities=fixed, **keywords, group=group)
        if ranks.rank:
            return
    made_by = provenance("compress", options)
    with ExitStack() as stack:
        if report is not None:
            document = {**done.to_dict(), "calibration": images.measured, "output": str(output), "provenance": made_by}
            stack.enter_context(atomic(report)).write_text(json.dumps(document, indent=2) + "\n")
        if masks is not None:
            done.masks.save(masks, made_by)
        write_state_dict(output, network.state_dict(), made_by)
    show(done, images.describe(), f"written to {output}")
