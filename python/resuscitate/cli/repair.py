"""`resuscitate repair`, and `resuscitate stats`, which measures for it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..methods.base import AUTO, DenseAccess, Schedule, method_named, registered
from . import flags
from .application import app, options_of, show, write_report
from .compare import Comparison
from .flags import opt
from .inputs import build_model, check_runs, read_images, read_labelled
from .method_options import method_name, method_options, recalibration, with_method_options

Recalibrate = Literal["auto", "exact", "ema", "none"]


@app.command()
@with_method_options(recalibrates=True)
def repair(
    model: flags.Model,
    pruned: Annotated[Path, opt("The pruned weights: .safetensors, .pt or .pth.")],
    calibration: flags.Calibration,
    output: flags.Output,
    dense: Annotated[str | None, opt("The weights before pruning, or 'running': what BatchNorm remembers.")] = None,
    dense_stats: Annotated[Path | None, opt("In their place: what `resuscitate stats` wrote.")] = None,
    method: Annotated[
        str, opt(f"auto, {', '.join(registered())}, or package.module:Class; its options are those below.")
    ] = "auto",
    schedule: Annotated[Schedule, opt("Measure on repaired layers, or on the unrepaired network.")] = "sequential",
    recalibrate: Annotated[Recalibrate, opt("BatchNorm; auto: exact for bn, else none (stays).")] = "auto",
    max_samples: flags.MaxSamples = None,
    gain_samples: Annotated[int | None, opt("At most so many for the gains.", min=1)] = None,
    batch_size: flags.BatchSize = 128,
    mean: flags.Mean = None,
    std: flags.Std = None,
    size: flags.Size = None,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    masks: Annotated[Path | None, opt("Which weights are in use, by `prune --masks`; default: those not zero.")] = None,
    fill: Annotated[bool, opt("Write layers with means as plain dense weights.")] = False,
    skip_first: Annotated[bool | None, opt("Leave the first convolution alone; default: unless refitted.")] = None,
    skip_last: Annotated[bool | None, opt("Leave the classifier alone; default: if its inputs differ.")] = None,
    on_nonfinite: flags.OnNonfinite = "raise",
    diagnostics: Annotated[bool, opt("Report what part of each layer's variance a gain can restore.")] = False,
    dtype: flags.Precision = None,
    device: flags.Device = None,
    memory: flags.Memory = None,
    scratch: flags.Scratch = None,
    resume: Annotated[Path | None, opt("A journal: a killed run goes on from it. Removed when all is written.")] = None,
    timeout: flags.Timeout = 600.0,
    workers: flags.Workers = 0,
    seed: flags.Seed = 0,
    test: Annotated[Path | None, opt("An .npz of images and `labels`: report the accuracy before and after.")] = None,
    detail: Annotated[bool, opt("Report each channel's variance before and after; takes --dense.")] = False,
    report: flags.Report = None,
    json_: Annotated[bool, opt("Print the report as JSON.", "--json")] = False,
    **chosen: Any,
) -> None:
    """Repair a pruned network from unlabelled images and write its weights. Runs under torchrun too."""
    options = options_of({**locals(), **chosen})
    if dense is not None and dense_stats is not None:
        raise typer.BadParameter("--dense and --dense-stats are two ways to say the same: give one")
    name, own, way = method_name(method), method_options(chosen), recalibration(recalibrate, chosen)
    needs_dense = name == AUTO or method_named(name).dense is not DenseAccess.NONE
    if dense is None and dense_stats is None and needs_dense:
        raise typer.BadParameter(f"method {name} matches the dense outputs: give --dense, or --method bn")
    if detail and (dense is None or dense == "running"):
        raise typer.BadParameter("--detail compares with the dense network: give its weights, --dense")
    from ..data.batches import most_images
    from ..deploy.checkpoints import load_weights, provenance, write_state_dict
    from ..network.masks import Masks
    from ..network.mean_layers import densify
    from ..runtime.distributed import Ranks, launched
    from ..utils.files import check_writable
    from ..workflows.plan import make_plan
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
    choices: dict[str, Any] = {"method": name, **own, "schedule": schedule, "recalibrate": way}
    choices |= {"gain_samples": gain_samples, "diagnostics": diagnostics}
    most = most_images(make_plan("repair", target, **choices).image_counts, max_samples)
    with launched(timeout) as group:
        ranks = Ranks(group)
        shard = ranks.rank, ranks.size
        images = read_images(calibration, mean, std, size, most, seed, shard, workers, batch_size)
        check_runs(network, images.head, calibration, device)
        score = None if test is None or ranks.rank else Accuracy(*read_labelled(test, mean, std, size, None, seed))
        seen = target if not isinstance(target, Path | str) and not ranks.rank else None
        comparison = Comparison(score, seen, detail and len(images.head) > 0, images.head, device, dtype, batch_size)
        comparison.add("pruned", network)
        keywords: dict[str, Any] = {"include": include, "exclude": exclude, "skip_first": skip_first}
        keywords |= {"skip_last": skip_last, "on_nonfinite": on_nonfinite, "resume": resume, "memory": memory}
        keywords |= {"max_samples": max_samples, "batch_size": batch_size, "dtype": dtype, "device": device}
        keywords |= {"scratch": scratch, "seed": seed, "masks": None if masks is None else Masks.load(masks)}
        done = run(network, target, images.all, **choices, **keywords, group=group)
        comparison.add("repaired", network)
        made_by = provenance(done.method, options)
        document = {
            **done.to_dict(),
            **comparison.found(),
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
            write_report(stack, report, done, document)
            write_state_dict(output, network.state_dict(), made_by)
        if resume is not None:
            resume.unlink()
    if json_:
        typer.echo(text)
    else:
        scores = ", ".join(f"{name} {score:.2f}" for name, score in comparison.scores.items())
        scored = [f"accuracy in per cent: {scores}"] if scores else []
        show(done, images.describe(), *scored, f"written to {output}")


@app.command()
def stats(
    model: flags.Model,
    dense: Annotated[Path, opt("The weights before pruning: .safetensors, .pt or .pth.")],
    calibration: flags.Calibration,
    output: flags.Output,
    max_samples: flags.MaxSamples = None,
    batch_size: flags.BatchSize = 128,
    mean: flags.Mean = None,
    std: flags.Std = None,
    size: flags.Size = None,
    dtype: flags.Precision = None,
    device: flags.Device = None,
    timeout: flags.Timeout = 600.0,
    workers: flags.Workers = 0,
    seed: flags.Seed = 0,
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
