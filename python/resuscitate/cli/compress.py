"""`resuscitate compress`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from . import flags
from .application import app, options_of, show, write_report
from .flags import opt
from .inputs import build_model, check_runs, read_images
from .method_options import method_name, method_options, with_method_options
from .prune import Allocation


@app.command()
@with_method_options(recalibrates=False)
def compress(
    model: flags.Model,
    dense: Annotated[Path, opt("The trained weights: .safetensors, .pt or .pth.")],
    calibration: flags.Calibration,
    output: flags.Output,
    sparsity: Annotated[float, opt("Fraction of the weights that goes, such as 0.9.")],
    allocation: Annotated[Allocation, opt("How it is shared out over the layers.")] = "global",
    pattern: Annotated[str, opt("unstructured or filter.")] = "unstructured",
    steps: Annotated[
        Any, opt("How many, or where to stop: 0.5,0.8,0.9.", parser=flags.parse_steps, metavar="STEPS")
    ] = 7,
    densities: Annotated[list[str] | None, opt("Layers to keep that much of: GLOB=DENSITY; repeatable.")] = None,
    min_per_layer: Annotated[int, opt("Weights that stay in each layer.", min=0)] = 1,
    min_per_channel: Annotated[int, opt("Weights that stay in each output channel.", min=0)] = 0,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    method: Annotated[str, opt("Of the repair after each step, as for `repair`.")] = "refit",
    max_samples: flags.MaxSamples = None,
    batch_size: flags.BatchSize = 128,
    mean: flags.Mean = None,
    std: flags.Std = None,
    size: flags.Size = None,
    dtype: flags.Precision = None,
    device: flags.Device = None,
    memory: flags.Memory = None,
    scratch: flags.Scratch = None,
    on_nonfinite: flags.OnNonfinite = "raise",
    resume: Annotated[Path | None, opt("Folder of journals: a killed run goes on from it.")] = None,
    seed: flags.Seed = 0,
    masks: flags.WrittenMasks = None,
    report: flags.Report = None,
    workers: flags.Workers = 0,
    timeout: flags.Timeout = 600.0,
    **chosen: Any,
) -> None:
    """Prune in steps, and repair after each step from unlabelled images. Runs under torchrun too."""
    options = options_of({**locals(), **chosen})
    from ..deploy.checkpoints import load_weights, provenance, write_state_dict
    from ..runtime.distributed import Ranks, launched
    from ..utils.files import check_writable
    from ..workflows.compress import compress as run

    for path in filter(None, (output, masks, report)):
        check_writable(path)
    fixed = flags.parse_densities(densities)
    network = build_model(model)
    load_weights(network, dense)
    with launched(timeout) as group:
        ranks = Ranks(group)
        shard = ranks.rank, ranks.size
        images = read_images(calibration, mean, std, size, max_samples, seed, shard, workers, batch_size)
        check_runs(network, images.head, calibration, device)
        pruning: dict[str, Any] = {"allocation": allocation, "pattern": pattern, "steps": steps, "densities": fixed}
        pruning |= {"min_per_layer": min_per_layer, "min_per_channel": min_per_channel}
        pruning |= {"include": include, "exclude": exclude, "resume": resume}
        running: dict[str, Any] = {"max_samples": max_samples, "batch_size": batch_size, "dtype": dtype, "seed": seed}
        running |= {"device": device, "memory": memory, "scratch": scratch, "on_nonfinite": on_nonfinite}
        own = method_options(chosen)
        done = run(network, sparsity, images.all, method=method_name(method), **own, **pruning, **running, group=group)
        if ranks.rank:
            return
    made_by = provenance("compress", options)
    with ExitStack() as stack:
        document = {**done.to_dict(), "calibration": images.measured, "output": str(output), "provenance": made_by}
        write_report(stack, report, done, document)
        if masks is not None:
            done.masks.save(masks, made_by)
        write_state_dict(output, network.state_dict(), made_by)
    show(done, images.describe(), f"written to {output}")
