"""`resuscitate regrow`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pruning.regrowth import Budget, Saliency
from ..workflows.regrow import Initial, Pattern
from . import flags
from .application import app, options_of, show, write_report
from .flags import opt
from .inputs import build_model, check_runs, read_images, read_labelled
from .method_options import method_name, method_options, with_method_options


@app.command()
@with_method_options(recalibrates=False)
def regrow(
    model: flags.Model,
    pruned: Annotated[Path, opt("The pruned weights: .safetensors, .pt or .pth.")],
    dense: Annotated[Path, opt("The weights before pruning.")],
    calibration: flags.Calibration,
    output: flags.Output,
    sparsity: Annotated[float, opt("Fraction of the weights that is to stay pruned, such as 0.9.")],
    masks: Annotated[Path | None, opt("The masks, as `prune --masks` wrote them; default: what is zero.")] = None,
    pattern: Annotated[Pattern, opt("Single weights, or whole channels (needs --masks).")] = "unstructured",
    budget: Annotated[Budget, opt("Which layers are given how much.")] = "greedy",
    densities: Annotated[list[str] | None, opt("Layers to bring to that much: GLOB=DENSITY; repeatable.")] = None,
    saliency: Annotated[Saliency, opt("Which weights of a layer; gradient needs --labelled.")] = "magnitude",
    denser: Annotated[Path | None, opt("Masks of a denser pruning, what they keep comes back first.")] = None,
    initial: Annotated[Initial, opt("The value of what comes back.")] = "dense",
    rounds: Annotated[int, opt("In so many equal parts.", min=1)] = 1,
    method: Annotated[str, opt("Of the repair after each round, as for `repair`; none: no repair.")] = "auto",
    labelled: Annotated[Path | None, opt("An .npz of images and `labels`, for --saliency gradient.")] = None,
    test: Annotated[Path | None, opt("An .npz of images and `labels` to score each round on.")] = None,
    accuracy: Annotated[float | None, opt("Stop when --test reaches it, in per cent.")] = None,
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
    write_masks: flags.WrittenMasks = None,
    report: flags.Report = None,
    workers: flags.Workers = 0,
    timeout: flags.Timeout = 600.0,
    **chosen: Any,
) -> None:
    """Give a network that was pruned too far back what it misses most, and repair it. Runs under torchrun too."""
    options = options_of({**locals(), **chosen})
    from ..deploy.checkpoints import load_weights, provenance, write_state_dict
    from ..network.masks import Masks
    from ..runtime.distributed import Ranks, launched
    from ..utils.files import check_writable
    from ..workflows.recoverability import Accuracy
    from ..workflows.regrow import regrow as run

    if denser is not None and saliency != "magnitude":
        raise typer.BadParameter("--denser says which weights come first: leave --saliency out")
    if (accuracy is not None) > (test is not None):
        raise typer.BadParameter("--accuracy is of --test: give that too")
    for path in filter(None, (output, write_masks, report)):
        check_writable(path)

    network, target = build_model(model), build_model(model)
    load_weights(network, pruned)
    load_weights(target, dense)
    keywords: dict[str, Any] = {"pattern": pattern, "budget": budget, "densities": flags.parse_densities(densities)}
    keywords |= {"initial": initial, "rounds": rounds, "accuracy": accuracy, "resume": resume}
    keywords |= {"max_samples": max_samples, "batch_size": batch_size, "dtype": dtype, "device": device, "seed": seed}
    keywords |= {"memory": memory, "scratch": scratch, "on_nonfinite": on_nonfinite}
    keywords |= {"method": None if method == "none" else method_name(method), **method_options(chosen)}
    keywords["saliency"] = saliency if denser is None else Masks.load(denser)
    if labelled is not None:
        pair = read_labelled(labelled, mean, std, size, None, seed)
        keywords["labelled"] = list(zip(*(part.split(batch_size) for part in pair), strict=True))
    keywords["evaluate"] = None if test is None else Accuracy(*read_labelled(test, mean, std, size, None, seed))
    with launched(timeout) as group:
        ranks = Ranks(group)
        shard = ranks.rank, ranks.size
        images = read_images(calibration, mean, std, size, max_samples, seed, shard, workers, batch_size)
        check_runs(network, images.head, calibration, device)
        now = Masks.from_zeros(network) if masks is None else Masks.load(masks)
        done = run(network, target, now, sparsity, images.all, **keywords, group=group)
        if ranks.rank:
            return
    made_by = provenance("regrow", options)
    with ExitStack() as stack:
        document = {**done.to_dict(), "calibration": images.measured, "output": str(output), "provenance": made_by}
        write_report(stack, report, done, document)
        if write_masks is not None:
            done.save(write_masks, made_by)
        write_state_dict(output, network.state_dict(), made_by)
    show(done, images.describe(), f"written to {output}")
