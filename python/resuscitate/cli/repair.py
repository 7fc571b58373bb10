"""`resuscitate repair`, and `resuscitate stats`, which measures for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data.batches import most_images
from ..engine.reference import DenseStatistics
from ..methods.base import AUTO, DenseAccess, Schedule, method_named, registered
from ..network.channel_matching import is_smaller
from ..network.masks import Masks
from ..network.mean_layers import densify
from ..workflows.plan import make_plan
from ..workflows.repair import repair as run
from . import flags
from .application import app, call, finish, made_by, options_of, run_time_options, show
from .compare import Comparison
from .flags import opt
from .inputs import load_model, opened, read_channels, read_labelled
from .method_options import method_name, method_options, of_recalibrations, recalibration, takes_methods

Recalibrate = Literal["auto", "exact", "ema", "none"]
METHODS = f"{AUTO}, {', '.join(registered())}, or package.module:Class; its options are those below."


@app.command()
@takes_methods
@flags.takes(flags.LAYERS | flags.REPAIRS | flags.RUN | flags.RANKS | of_recalibrations())
def repair(
    model: flags.Model,
    pruned: flags.Pruned,
    calibration: flags.Calibration,
    output: flags.Output,
    dense: Annotated[str | None, opt("The weights before pruning, or 'running': BatchNorm's own statistics.")] = None,
    dense_stats: Annotated[Path | None, opt("In their place: what `resuscitate stats` wrote.")] = None,
    method: Annotated[str, opt(METHODS)] = AUTO,
    schedule: Annotated[Schedule, opt("Measure each layer on repaired ones, or all unrepaired.")] = "sequential",
    recalibrate: Annotated[Recalibrate, opt("BatchNorm; auto: exact for bn, else none (dense statistics).")] = "auto",
    gain_samples: Annotated[int | None, opt("Measure the layers on at most so many images.", min=1)] = None,
    masks: Annotated[Path | None, opt("Weights in use, by `prune --masks`; default: those not zero.")] = None,
    channels: Annotated[
        Path | None,
        opt("JSON, {layer: [indices]}: which dense channels a smaller network has, where that is not clear."),
    ] = None,
    fill: Annotated[bool, opt("Write mean layers as plain dense weights.")] = False,
    skip_first: Annotated[bool | None, opt("Leave the first layer unchanged; default: unless refitted.")] = None,
    skip_last: Annotated[bool | None, opt("Leave the classifier unchanged; default: if its inputs differ.")] = None,
    diagnostics: Annotated[bool, opt("Report what part of each layer's variance a gain can restore.")] = False,
    resume: Annotated[Path | None, opt("A journal: a killed run continues from it. Removed at the end.")] = None,
    test: Annotated[Path | None, opt("An .npz of images and `labels`: report accuracy before and after.")] = None,
    detail: Annotated[bool, opt("Report each channel's variance before and after; needs --dense.")] = False,
    report: flags.Report = None,
    json_: flags.Json = False,
    **given: Any,
) -> None:
    """Repair a pruned network from unlabelled images and write its weights. Runs under torchrun too."""
    options = options_of(locals())
    if dense is not None and dense_stats is not None:
        raise typer.BadParameter("--dense and --dense-stats are two ways to say the same: give one")
    name = method_name(method)
    needs_dense = name == AUTO or method_named(name).dense is not DenseAccess.NONE
    if dense is None and dense_stats is None and needs_dense:
        raise typer.BadParameter(f"method {name} matches the dense outputs: give --dense, or --method bn")
    if detail and dense in (None, "running"):
        raise typer.BadParameter("--detail compares with the dense network: give its weights, --dense")
    network = load_model(model, pruned)
    whole = None if dense in (None, "running") else load_model(model, str(dense))
    target = dense_stats or dense if whole is None else whole
    chosen = {"dense": target, "method": name, **method_options(options), "recalibrate": recalibration(options)}
    most = most_images(call(make_plan, options, call="repair", **chosen).image_counts, options["max_samples"])
    if detail and whole is not None and is_smaller(network, whole):
        raise typer.BadParameter("--detail compares channel by channel: the pruned network has fewer")
    chosen |= {"model": network, "masks": None if masks is None else Masks.load(masks)}
    chosen["channels"] = None if channels is None else read_channels(channels)
    with opened(network, options, max_samples=most) as (images, ranks):
        score = None if test is None or ranks.rank else read_labelled(test, options)
        seen = images.head if detail else None
        comparison = Comparison(score, None if ranks.rank else whole, seen, run_time_options(options))
        comparison.add("pruned", network)
        done = call(run, options, calibration=images.all, group=ranks.group, **chosen)
        comparison.add("repaired", network)
        if ranks.rank:
            return
    if fill:
        densify(network)
    finish(done.method, network, options, done, images, **comparison.found())
    if resume is not None:
        resume.unlink()


@app.command()
@flags.takes(flags.RUN | flags.RANKS)
def stats(
    model: flags.Model, dense: flags.Dense, calibration: flags.Calibration, output: flags.Output, **given: Any
) -> None:
    """Measure a dense network once, for `repair --dense-stats` of any number of its pruned copies."""
    options = options_of(locals())
    network = load_model(model, dense)
    with opened(network, options) as (images, ranks):
        found = DenseStatistics.measure(network, images.all, group=ranks.group, **run_time_options(options))
        if ranks.rank:
            return
    found.save(output, made_by("stats", options))
    show(images.describe(), f"{len(found.layers)} layers over {found.images} images; written to {output}")
