"""`resuscitate repair`, and `resuscitate stats`, which measures for it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..methods.choices import Method, OnNonfinite, Schedule
from ..network.mean_layers import Per
from .app import app, options_of, show
from .compare import Comparison
from .inputs import build_model, check_runs, read_images, read_labelled
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
    opt,
    parse_prior,
)

Recalibrate = Literal["auto", "exact", "ema", "none"]


@app.command()
def repair(
    model: Model,
    pruned: Annotated[Path, opt("The pruned weights: .safetensors, .pt or .pth.")],
    calibration: Calibration,
    output: Output,
    dense: Annotated[str | None, opt("The weights before pruning, or 'running': what BatchNorm remembers.")] = None,
    dense_stats: Annotated[Path | None, opt("In their place: what `resuscitate stats` wrote.")] = None,
    method: Annotated[Method, opt("Refit the weights, match the outputs by a gain, or BatchNorm alone.")] = "auto",
    schedule: Annotated[Schedule, opt("Measure on repaired layers, or on the broken net.")] = "sequential",
    recalibrate: Annotated[Recalibrate, opt("BatchNorm; auto: exact for bn, else none (stays).")] = "auto",
    max_samples: MaxSamples = None,
    gain_samples: Annotated[int | None, opt("At most so many for the gains.", min=1)] = None,
    recalibrate_samples: Annotated[int | None, opt("At most so many for an exact BatchNorm.", min=1)] = None,
    batch_size: BatchSize = 128,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    prior: Annotated[Any, opt("Of asr: median, mean or a variance.", parser=parse_prior, metavar="PRIOR")] = "median",
    bias: Annotated[bool, opt("Match the means too.")] = True,
    eps: Annotated[float, opt("Added to variances that are divided by.")] = 1e-8,
    include: Include = None,
    exclude: Exclude = None,
    masks: Annotated[Path | None, opt("Which weights are in use, by `prune --masks`; default: those not zero.")] = None,
    means: Annotated[Per | None, opt("Of mean and refit: what shares a mean of pruned weights.")] = None,
    fill: Annotated[bool, opt("Write layers with means as plain dense weights.")] = False,
    ridge: Annotated[
        float | None, opt("Of refit: the pull towards the weights as they are; without it, by cross-validation.")
    ] = None,
    relu_aware: Annotated[bool, opt("Of refit: let go of errors that the ReLU behind a layer hides.")] = True,
    skip_first: Annotated[bool | None, opt("Leave the first convolution alone; default: unless refitted.")] = None,
    skip_last: Annotated[bool | None, opt("Leave the classifier alone; default: if its inputs differ.")] = None,
    ema_batches: Annotated[int, opt("Batches of an ema recalibration.", min=1)] = 20,
    ema_batch_size: Annotated[int, opt("Their size.", min=1)] = 128,
    ema_momentum: Annotated[float, opt("Its momentum.")] = 0.1,
    on_nonfinite: Annotated[OnNonfinite, opt("On images with NaN or infinite activations.")] = "raise",
    correlations: Annotated[bool, opt("Report what share of each layer a gain can bring back.")] = False,
    dtype: Precision = None,
    device: Device = None,
    memory: Annotated[str | None, opt("For images and activations: 4GiB; default: half of what is free.")] = None,
    scratch: Annotated[Path | None, opt("Folder for what exceeds that.")] = None,
    resume: Annotated[Path | None, opt("A journal: a killed run goes on from it. Removed when all is written.")] = None,
    timeout: Timeout = 600.0,
    workers: Workers = 0,
    seed: Seed = 0,
    test: Annotated[Path | None, opt("An .npz of images and `labels`: report the accuracy before and after.")] = None,
    detail: Annotated[bool, opt("Report each channel's variance before and after; takes --dense.")] = False,
    report: Annotated[Path | None, opt("Write the report as JSON to this file.")] = None,
    json_: Annotated[bool, opt("Print the report as JSON.", "--json")] = False,
) -> None:
    """Repair a pruned network from unlabelled images and write its weights. Runs under torchrun too."""
    options = options_of(locals())
    if dense is not None and dense_stats is not None:
        raise typer.BadParameter("--dense and --dense-stats are two ways to say the same: give one")
    if dense is None and dense_stats is None and method != "bn":
        raise typer.BadParameter("all methods but bn match the dense outputs: give --dense, or --method bn")
    if detail and (dense is None or dense == "running"):
        raise typer.BadParameter("--detail compares with the dense network: give its weights, --dense")
    from ..data.batches import most_images
    from ..deploy.checkpoints import load_weights, provenance, write_state_dict
    from ..network.masks import Masks
    from ..network.mean_layers import densify
    from ..runtime.distributed import Ranks, launched
    from ..utils.files import atomic, check_writable
    from ..workflows.recoverability import Accuracy
    from ..workflows.repair import repair as run

    for path in filter(None, (output, report)):
        check_writable(path)
    network = build_model(model)
    load_weights(network, pruned)
    target: Any = dense_stats or dense
    if dense is not None and dense != "running":
        target = build_model(model)
        load_weights(target, dense)
    exact = recalibrate == "exact" or (recalibrate == "auto" and method == "bn")
    wanted = [] if method == "bn" else [gain_samples]
    wanted += [recalibrate_samples] if exact else [ema_batches * ema_batch_size] if recalibrate == "ema" else []
    with launched(timeout) as group:
        ranks = Ranks(group)
        most, shard = most_images(wanted, max_samples), (ranks.rank, ranks.size)
        images = read_images(calibration, mean, std, size, most, seed, shard, workers, batch_size)
        check_runs(network, images.head, calibration, device)
        score = None if test is None or ranks.rank else Accuracy(*read_labelled(test, mean, std, size, None, seed))
        seen = target if not isinstance(target, Path | str) and not ranks.rank else None
        eyes = Comparison(score, seen, detail and len(images.head) > 0, images.head, device, dtype, batch_size)
        eyes.look("pruned", network)
        keywords = {name: options[name] for name in run.__kwdefaults__ if name in options}  # type: ignore[union-attr]
        keywords["masks"] = None if masks is None else Masks.load(masks)
        keywords["recalibrate"] = None if recalibrate == "none" else recalibrate
        done = run(network, target, images.all, **keywords, group=group)
        eyes.look("repaired", network)
        made_by = provenance(done.method, options)
        document = {
            **done.to_dict(),
            **eyes.found(),
            "calibration": images.measured,
            "output": str(output),
            "provenance": made_by,
        }
        text = json.dumps(document, indent=2)
        if ranks.rank:
            return
        if fill:
            densify(network)
        with ExitStack() as stack:
            if report is not None:
                stack.enter_context(atomic(report)).write_text(f"{text}\n")
            write_state_dict(output, network.state_dict(), made_by)
        if resume is not None:
            resume.unlink()
    if json_:
        typer.echo(text)
    else:
        scores = ", ".join(f"{name} {score:.2f}" for name, score in eyes.scores.items())
        scored = [f"accuracy in per cent: {scores}"] if scores else []
        show(done, images.describe(), *scored, f"written to {output}")


@app.command()
def stats(
    model: Model,
    dense: Annotated[Path, opt("The weights before pruning: .safetensors, .pt or .pth.")],
    calibration: Calibration,
    output: Output,
    max_samples: MaxSamples = None,
    batch_size: BatchSize = 128,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    dtype: Precision = None,
    device: Device = None,
    timeout: Timeout = 600.0,
    workers: Workers = 0,
    seed: Seed = 0,
) -> None:
    """Measure a dense network once, for `repair --dense-stats` of any number of its pruned copies."""
    options = options_of(locals())
    from ..deploy.checkpoints import load_weights, provenance
    from ..engine.reference import DenseStatistics
    from ..runtime.distributed import Ranks, launched
    from ..utils.files import check_writable

    check_writable(output)
    network = build_model(model)
    load_weights(network, dense)
    with launched(timeout) as group:
        ranks = Ranks(group)
        shard = ranks.rank, ranks.size
        images = read_images(calibration, mean, std, size, max_samples, seed, shard, workers, batch_size)
        check_runs(network, images.head, calibration, device)
        found = DenseStatistics.measure(
            network, images.all, batch_size=batch_size, dtype=dtype, device=device, group=group, seed=seed
        )
        if ranks.rank:
            return
        found.save(output, provenance("stats", options))
    show(images.describe(), f"{len(found.layers)} layers over {found.images} images; written to {output}")
